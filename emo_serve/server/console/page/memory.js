// Memory against accuracy on the operator's own text: the loss of every pool and size chosen, from
// the log-probabilities that the server gives the text's tokens.

import { el, field, newId, setText, table } from "./dom.js";
import { FILES, takeFiles } from "./examples.js";
import { count, perLayer, plural, size } from "./format.js";
import { roundUp } from "./chart.js";
import { Plot } from "./plot.js";
import { poolPath } from "./server.js";

const AT_ONCE = 4;
const LONGEST = 4000; // characters of a piece of text
const COLUMNS = [
  ["Pool"],
  ["Experts per layer", true],
  ["Experts in memory", true],
  ["Tokens", true],
  ["Loss, nats per token", true],
  ["More than base", true],
];

export class Memory {
  static path = "memory";
  static title = "Memory and accuracy";

  #app;
  #abort = null;
  #files = [];

  constructor(app, root) {
    this.#app = app;
    this.plot = new Plot({
      title: "Loss against memory",
      x: "experts in memory",
      y: "loss, nats per token",
      formatX: size,
      roundX: (bytes) => roundUp(bytes / unitOf(bytes)) * unitOf(bytes),
      formatY: (value) => value.toFixed(2),
    });
    const { table: made, body } = table("Loss by pool", COLUMNS);
    this.body = body;
    root.append(
      this.#makeForm(),
      el(
        "section",
        {},
        el("h2", {}, "Your curve"),
        this.plot.element,
        el("div", { class: "scroller" }, made),
      ),
    );
    app.live.addEventListener("pools", () => this.#suggest());
  }

  show() {
    this.#suggest();
  }

  #makeForm() {
    const ids = Object.fromEntries(
      ["text", "files", "pools", "most"].map((word) => [word, newId(word)]),
    );
    this.text = el("textarea", { id: ids.text, rows: "7", spellcheck: "false" });
    this.files = el("input", { id: ids.files, ...FILES });
    this.taken = el("span", { class: "quiet" });
    this.pools = el("input", {
      id: ids.pools,
      class: "long",
      spellcheck: "false",
      autocomplete: "off",
    });
    this.most = el("input", { id: ids.most, type: "number", min: "1", max: "1000", value: "24" });
    this.start = el("button", { class: "primary", type: "submit" }, "Measure");
    this.stop = el("button", { type: "button", on: { click: () => this.#abort?.abort() } }, "Stop");
    this.stop.disabled = true;
    this.progress = el("progress", { "aria-label": "Measuring", value: "0", max: "1" });
    this.progress.hidden = true;
    this.said = el("p", { class: "result", role: "status" });
    const form = el(
      "form",
      { class: "playground dropzone" },
      el(
        "p",
        { class: "quiet" },
        "Give text of your domain that no pool was found on: each pool reads it and tells how well it foresaw every token. Lower is better. A size other than a pool's own (math@8) needs scores in its file.",
      ),
      el("div", { class: "stack" }, el("label", { for: ids.text }, "Held-out text"), this.text),
      el(
        "div",
        { class: "fields" },
        field(ids.files, "or files: .txt or .jsonl, which may be dropped here", this.files),
        this.taken,
      ),
      el(
        "div",
        { class: "stack" },
        el("label", { for: ids.pools }, "Pools and sizes (base, math, math@8, math+code)"),
        this.pools,
      ),
      el(
        "div",
        { class: "fields" },
        field(ids.most, "Most pieces of text", this.most),
        this.start,
        this.stop,
        this.progress,
      ),
      this.said,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#measure();
    });
    takeFiles(form, this.files, {
      taken: (_, documents) => {
        this.#files.push(...documents.map(textOf));
        this.#say("");
      },
      refused: (error) => this.#say(error.message, true),
      ended: () => setText(this.taken, plural(this.#files.length, "document")),
    });
    return form;
  }

  #suggest() {
    const cards = this.#app.live.pools?.data ?? [];
    const pools = cards.filter((card) => card.kind === "pool").map((card) => card.name);
    if (pools.length && !this.pools.value)
      this.pools.value = ["base", ...pools.slice(0, 2)].join(", ");
  }

  // -- the measurement --

  async #measure() {
    const wanted = [
      ...new Set(
        this.pools.value
          .split(",")
          .map((name) => name.trim())
          .filter(Boolean),
      ),
    ];
    const texts = [...this.#files, this.text.value].filter((text) => text.trim());
    if (!texts.length || !wanted.length) {
      this.#say(texts.length ? "Name a pool." : "Give a text, or a file.", true);
      return;
    }
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    const rows = [];
    this.start.disabled = true;
    this.stop.disabled = false;
    this.progress.hidden = false;
    try {
      const pieces = await this.#pieces(texts);
      for (const [place, name] of wanted.entries()) {
        this.#say(`${name}: ${plural(pieces.length, "piece")} of text ...`);
        const card = await this.#app.server.json("GET", poolPath(name));
        const tell = (done) =>
          (this.progress.value = (place + done / pieces.length) / wanted.length);
        const found = await this.#lossOf(card.name, pieces, signal, tell);
        rows.push({ name, card, ...found });
        this.#show(rows);
      }
      this.#say(
        `Done: ${plural(pieces.length, "piece")} of text in ${plural(wanted.length, "pool")}.`,
      );
    } catch (error) {
      this.#say(
        error.name === "AbortError" ? "Stopped." : `Not measured: ${error.message}`,
        error.name !== "AbortError",
      );
    } finally {
      this.start.disabled = false;
      this.stop.disabled = true;
      this.progress.hidden = true;
    }
  }

  /** Split texts to fit the model: a token has at least one character. */
  async #pieces(texts) {
    const models = await this.#app.server.json("GET", "v1/models");
    const longest = Math.min(LONGEST, (models.data[0].max_model_len ?? LONGEST) - 2);
    const pieces = [];
    for (const text of texts) {
      for (let start = 0; start < text.length; start += longest)
        pieces.push(text.slice(start, start + longest));
    }
    return pieces.filter((piece) => piece.trim().length > 1).slice(0, Number(this.most.value));
  }

  /** Return the mean loss of a pool over pieces of text, a few of which are read at once. */
  async #lossOf(pool, pieces, signal, tell) {
    let [sum, tokens, next, done] = [0, 0, 0, 0];
    const work = async () => {
      while (next < pieces.length) {
        const piece = pieces[next];
        next += 1;
        const answer = await this.#app.server.json("POST", "v1/completions", {
          body: { prompt: piece, max_tokens: 1, temperature: 0, prompt_logprobs: 0 },
          headers: { "x-emo-pool": pool },
          signal,
        });
        for (const position of answer.choices[0].prompt_logprobs ?? []) {
          if (position === null) continue; // the first token, which nothing foretells
          sum -= Object.values(position)[0].logprob;
          tokens += 1;
        }
        done += 1;
        tell(done);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    if (!tokens) throw new Error("the server gave no log-probabilities");
    return { loss: sum / tokens, tokens };
  }

  // -- what came out --

  #show(rows) {
    const base = rows.find((row) => row.card.kind === "base")?.loss ?? null;
    const series = new Map();
    for (const { name, card, loss } of rows) {
      const line = name.split("@")[0];
      const point = {
        x: card.bytes,
        y: loss,
        label: `${name}: ${loss.toFixed(3)} at ${size(card.bytes)}`,
      };
      series.set(line, [...(series.get(line) ?? []), point]);
    }
    this.plot.show([...series].map(([name, points]) => ({ name, points })));
    this.body.replaceChildren(
      ...rows.map(({ name, card, loss, tokens }) => {
        const more = base === null ? "-" : `${loss >= base ? "+" : ""}${(loss - base).toFixed(3)}`;
        const texts = [
          perLayer(card.experts_per_layer),
          size(card.bytes),
          count(tokens),
          loss.toFixed(3),
          more,
        ];
        const cells = texts.map((text, place) =>
          el("td", { role: "cell", "data-label": COLUMNS[place + 1][0], class: "number" }, text),
        );
        return el(
          "tr",
          { role: "row" },
          el("th", { role: "rowheader", scope: "row" }, name),
          ...cells,
        );
      }),
    );
  }

  #say(text, isError = false) {
    setText(this.said, text);
    this.said.classList.toggle("error", isError);
  }
}

/** The bytes of the unit that `size` writes. */
function unitOf(bytes) {
  return bytes >= 0.1 * 2 ** 30 ? 2 ** 30 : 2 ** 20;
}

function textOf(example) {
  if (typeof example === "string") return example;
  return example.text ?? example.messages.map((message) => message.content).join("\n");
}
