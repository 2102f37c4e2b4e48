// A pool from examples: pasted or dropped texts, and what comes back.

import { el, field, newId, setText } from "./dom.js";
import { count, percent, plural } from "./format.js";
import { FILES, takeFiles } from "./examples.js";

export class Building {
  #app;
  #done;
  #isBuilding = false;
  #examples = []; // {name, examples} of each file

  /** `done` is called with the name of a pool that was built. */
  constructor(app, done) {
    this.#app = app;
    this.#done = done;
    this.element = this.#make();
    app.changes.addEventListener("access", () => this.#update());
    app.live.addEventListener("pools", () => this.#follow());
    this.#update();
  }

  #make() {
    const ids = Object.fromEntries(
      ["name", "size", "text", "files", "about"].map((word) => [word, newId(word)]),
    );
    this.name = el("input", {
      id: ids.name,
      required: true,
      pattern: "[a-z0-9_\\-][a-z0-9._\\-]{0,63}",
      spellcheck: "false",
      autocomplete: "off",
    });
    this.size = el("input", { id: ids.size, type: "number", min: "1", value: "8", required: true });
    this.about = el("input", { id: ids.about, autocomplete: "off" });
    this.text = el("textarea", { id: ids.text, rows: "5", spellcheck: "false" });
    this.files = el("input", { id: ids.files, ...FILES });
    this.taken = el("ul", { class: "chips", "aria-label": "Files" });
    this.start = el("button", { class: "primary", type: "submit" }, "Build");
    this.said = el("p", { class: "result", role: "status" });
    this.progress = el("progress", { "aria-label": "Building" });
    this.progress.hidden = true;
    this.percent = el("span", { class: "quiet" });
    this.notes = el("ul", {});
    const form = el(
      "form",
      { class: "playground dropzone" },
      el(
        "div",
        { class: "fields" },
        field(ids.name, "Name", this.name),
        field(ids.size, "Experts per layer", this.size),
        field(ids.about, "Description", this.about),
      ),
      el(
        "div",
        { class: "stack" },
        el("label", { for: ids.text }, "A text of the domain"),
        this.text,
      ),
      el(
        "div",
        { class: "fields" },
        field(
          ids.files,
          "and files: .txt (one document) or .jsonl (one per line); they may be dropped here",
          this.files,
        ),
      ),
      this.taken,
      el("div", { class: "fields" }, this.start, this.progress, this.percent),
      this.said,
      this.notes,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#build();
    });
    takeFiles(form, this.files, {
      taken: (name, examples) => {
        this.#examples.push({ name, examples });
        this.#say("");
      },
      refused: (error) => this.#say(error.message, true),
      ended: () => this.#showFiles(),
    });
    return el("section", {}, el("h2", {}, "A new pool from examples"), form);
  }

  /** Show how far the server is with the pool that it builds, whoever asked for it. */
  #follow() {
    const { building } = this.#app.live.pools;
    this.progress.hidden = !building && !this.#isBuilding;
    if (building?.total) {
      this.progress.max = building.total;
      this.progress.value = building.done;
      const share = percent(building.done / building.total, 0);
      setText(this.percent, `${building.name}: ${share} of the examples' passes`);
    } else {
      this.progress.removeAttribute("value");
      setText(this.percent, "");
    }
  }

  #update() {
    const { refusal } = this.#app;
    this.start.disabled = refusal !== null;
    this.start.title = refusal === null ? "" : `Not now: ${refusal}`;
  }

  #showFiles() {
    const chips = this.#examples.map((one) => {
      const remove = () => {
        this.#examples = this.#examples.filter((other) => other !== one);
        this.#showFiles();
      };
      const attributes = { type: "button", class: "small", "aria-label": `Take ${one.name} away` };
      return el(
        "li",
        {},
        `${one.name}: ${plural(one.examples.length, "document")}`,
        el("button", { ...attributes, on: { click: remove } }, "x"),
      );
    });
    this.taken.replaceChildren(...chips);
  }

  async #build() {
    const examples = this.#examples.flatMap((one) => one.examples);
    if (this.text.value.trim()) examples.push(this.text.value);
    if (!examples.length) {
      this.#say("Give a text, or a file.", true);
      return;
    }
    const start = performance.now();
    const tell = () =>
      this.#say(
        `Building from ${plural(examples.length, "document")}, for ${Math.round((performance.now() - start) / 1000)} s. It goes on if this tab is closed.`,
      );
    tell();
    const timer = setInterval(tell, 1000);
    this.start.disabled = true;
    this.#isBuilding = true;
    this.progress.hidden = false;
    this.notes.replaceChildren();
    try {
      const body = {
        name: this.name.value,
        experts: Number(this.size.value),
        examples,
        description: this.about.value,
      };
      const made = await this.#app.server.json("POST", "v1/pools", { body });
      clearInterval(timer);
      const { calibration: found } = made;
      this.#say(
        `${made.name} is defined: ${percent(found.coverage)} coverage on ${count(found.tokens)} tokens of ${plural(found.documents, "document")}, in ${found.seconds.toFixed(1)} s.`,
      );
      this.notes.replaceChildren(...made.notes.map((note) => el("li", {}, note)));
      this.#done(made.name);
    } catch (error) {
      this.#say(`Not built: ${error.message}`, true);
    } finally {
      clearInterval(timer);
      this.#isBuilding = false;
      this.#follow();
      this.#update();
    }
  }

  #say(text, isError = false) {
    setText(this.said, text);
    this.said.classList.toggle("error", isError);
  }
}
