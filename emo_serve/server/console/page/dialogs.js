// The two questions that the page asks: for a key, and whether something is meant.

const byId = (id) => document.getElementById(id);

export class Dialogs {
  /** Ask for a key; return it, "" for none, or null if it was not given. */
  askKey(text) {
    const dialog = byId("key-dialog");
    byId("key-text").textContent = text;
    byId("key-input").value = "";
    if (dialog.open) return Promise.resolve(null); // it is being asked already
    return ask(dialog, byId("key-form"), byId("key-cancel"), () => {
      const key = byId("key-input").value.trim();
      byId("key-input").value = "";
      return key;
    });
  }

  /** Ask whether something is meant; `verb` is what the button says. */
  async confirm(title, text, verb) {
    byId("confirm-title").textContent = title;
    byId("confirm-text").textContent = text;
    byId("confirm-yes").textContent = verb;
    const dialog = byId("confirm-dialog");
    return (await ask(dialog, byId("confirm-form"), byId("confirm-no"), () => true)) ?? false;
  }
}

function ask(dialog, form, no, read) {
  return new Promise((resolve) => {
    let answer = null;
    const listeners = new AbortController();
    const { signal } = listeners;
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        answer = read();
        dialog.close();
      },
      { signal },
    );
    no.addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener(
      "close",
      () => {
        listeners.abort();
        resolve(answer);
      },
      { signal },
    );
    dialog.showModal();
  });
}
