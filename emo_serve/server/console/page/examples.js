// Files of texts, read as emo-serve reads them: a .txt file is one document, a .jsonl file has one
// per line, a string, {"text": ...} or {"messages": [...]}.

/** Attributes of an input of such files. */
export const FILES = { type: "file", accept: ".txt,.jsonl", multiple: true };

/**
 * Have a form read the files that its input is given, or that are dropped on it.
 *
 * `taken(name, documents)` is called for each file and `refused(error)` for one that cannot be
 * read; `ended()` when all have been.
 */
export function takeFiles(form, input, { taken, refused, ended }) {
  const take = async (files) => {
    for (const file of files) {
      try {
        taken(file.name, readExamples(file.name, await file.text()));
      } catch (error) {
        refused(error);
      }
    }
    input.value = "";
    ended();
  };
  input.addEventListener("change", () => take(input.files));
  form.addEventListener("dragover", (event) => event.preventDefault());
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files);
  });
}

/** Return a file's documents; throws an Error that names file and line. */
export function readExamples(name, text) {
  if (!name.toLowerCase().endsWith(".jsonl")) {
    if (!text.trim()) throw new Error(`${name} has no text`);
    return [text];
  }
  const found = [];
  text.split("\n").forEach((line, place) => {
    if (!line.trim()) return;
    let read;
    try {
      read = JSON.parse(line);
    } catch {
      throw new Error(`${name}, line ${place + 1} is no JSON`);
    }
    if (
      typeof read !== "string" &&
      typeof read?.text !== "string" &&
      !Array.isArray(read?.messages)
    ) {
      throw new Error(
        `${name}, line ${place + 1} is neither a string nor has "text" or "messages"`,
      );
    }
    found.push(read);
  });
  if (!found.length) throw new Error(`${name} has no documents`);
  return found;
}
