// One prompt, answered by several pools side by side, as it streams.

import { el, field, newId, setText } from "./dom.js";
import { count, figure, percent, seconds } from "./format.js";
import { eventsOf } from "./server.js";

const MOST_POOLS = 4; // with `auto` and the stream of what happens, six connections: see live.js
const MODES = {
  completion: {
    title: "Completion",
    path: "v1/completions",
    body: (prompt, tokens) => ({ prompt, max_tokens: tokens }),
    text: (choice) => choice.text ?? "",
  },
  chat: {
    title: "Chat",
    path: "v1/chat/completions",
    body: (prompt, tokens) => ({
      messages: [{ role: "user", content: prompt }],
      max_completion_tokens: tokens,
    }),
    text: (choice) => choice.delta?.content ?? "",
  },
};

export class Playground {
  static path = "playground";
  static title = "Playground";

  #app;
  #pools = [];
  #abort = null;

  constructor(app, root) {
    this.#app = app;
    root.append(this.#makeForm(), this.#makeAuto(), this.#makeAnswers());
    app.live.addEventListener("pools", () => this.#updateNames());
  }

  show() {
    this.#updateNames();
    if (!this.#pools.length && this.#app.live.pools) this.#chooseFirst();
  }

  // -- parts --

  #makeForm() {
    const ids = Object.fromEntries(
      ["prompt", "pool", "names", "tokens", "heat"].map((word) => [word, newId(word)]),
    );
    this.prompt = el("textarea", { id: ids.prompt, rows: "5", spellcheck: "false" });
    this.prompt.value = "def add(a, b):\n";
    this.names = el("datalist", { id: ids.names });
    this.pool = el("input", {
      id: ids.pool,
      list: ids.names,
      autocomplete: "off",
      spellcheck: "false",
    });
    this.pool.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.#add(this.pool.value);
    });
    this.chips = el("ul", { class: "chips", "aria-label": "Chosen pools" });
    this.tokens = el("input", {
      id: ids.tokens,
      type: "number",
      min: "1",
      max: "4096",
      value: "64",
    });
    this.heat = el("input", {
      id: ids.heat,
      type: "number",
      min: "0",
      max: "2",
      step: "0.1",
      value: "0",
    });
    this.send = el("button", { class: "primary", type: "submit" }, "Answer");
    this.stop = el("button", { type: "button", on: { click: () => this.#abort?.abort() } }, "Stop");
    this.stop.disabled = true;
    this.said = el("p", { class: "result", role: "status" });
    const add = el(
      "button",
      { type: "button", on: { click: () => this.#add(this.pool.value) } },
      "Add",
    );
    const form = el(
      "form",
      { class: "playground" },
      el("div", { class: "stack" }, el("label", { for: ids.prompt }, "Prompt"), this.prompt),
      el(
        "div",
        { class: "stack" },
        el("label", { for: ids.pool }, "Pools, unions (math+code) or auto"),
        el("div", { class: "joined" }, this.pool, add),
        this.names,
        this.chips,
      ),
      el(
        "div",
        { class: "fields" },
        this.#makeModes(),
        field(ids.tokens, "Most tokens", this.tokens),
        field(ids.heat, "Temperature", this.heat),
        this.send,
        this.stop,
      ),
      this.said,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#answer();
    });
    return form;
  }

  #makeModes() {
    const set = el("fieldset", {}, el("legend", { class: "unseen" }, "Kind of request"));
    for (const [value, { title }] of Object.entries(MODES)) {
      const id = newId("mode");
      const button = el("input", {
        id,
        type: "radio",
        name: "mode",
        value,
        checked: value === "completion",
      });
      set.append(button, el("label", { for: id }, title));
    }
    this.modes = set;
    return set;
  }

  #makeAuto() {
    this.auto = el("p", { role: "status" }, "Not asked yet.");
    return el("section", {}, el("h2", {}, "What auto would take"), this.auto);
  }

  #makeAnswers() {
    this.answers = el("div", { class: "answers" });
    return el("section", {}, el("h2", {}, "Answers"), this.answers);
  }

  // -- the choice of pools --

  #updateNames() {
    const names = ["auto", ...(this.#app.live.pools?.data ?? []).map((card) => card.name)];
    const there = Array.from(this.names.children, (option) => option.value);
    if (names.join("\n") !== there.join("\n")) {
      this.names.replaceChildren(...names.map((value) => el("option", { value })));
    }
  }

  #chooseFirst() {
    const cards = this.#app.live.pools.data;
    const pools = cards.filter((card) => card.kind === "pool");
    const resident = pools.filter((card) => card.resident);
    const others = pools.filter((card) => !card.resident);
    for (const card of [...resident, ...others].slice(0, 2)) this.#add(card.name);
  }

  #add(written) {
    const name = written.trim();
    if (!name || this.#pools.includes(name)) return;
    if (this.#pools.length >= MOST_POOLS) {
      this.#say(`At most ${MOST_POOLS} pools side by side; take one away first.`, true);
      return;
    }
    this.#pools.push(name);
    this.pool.value = "";
    this.#say("");
    this.#updateChips();
  }

  #updateChips() {
    const chips = this.#pools.map((name) => {
      const remove = () => {
        this.#pools = this.#pools.filter((other) => other !== name);
        this.#updateChips();
        this.pool.focus();
      };
      const attributes = { type: "button", class: "small", "aria-label": `Take ${name} away` };
      return el("li", {}, name, el("button", { ...attributes, on: { click: remove } }, "x"));
    });
    this.chips.replaceChildren(...chips);
  }

  // -- answers --

  async #answer() {
    if (!this.#pools.length) {
      this.#say("Choose a pool first.", true);
      return;
    }
    const mode = MODES[this.modes.querySelector(":checked").value];
    const temperature = Number(this.heat.value);
    const body = { ...mode.body(this.prompt.value, Number(this.tokens.value)), temperature };
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    this.send.disabled = true;
    this.stop.disabled = false;
    this.#say("");
    const answers = this.#pools.map((name) => new Answer(name));
    this.answers.replaceChildren(...answers.map((answer) => answer.element));
    try {
      await Promise.all([
        this.#askAuto(mode, { ...mode.body(this.prompt.value, 1), temperature }, signal),
        ...answers.map((answer) => answer.run(this.#app.server, mode, body, signal)),
      ]);
    } finally {
      this.send.disabled = false;
      this.stop.disabled = true;
    }
  }

  /** Ask for one token of `auto`: the answer's header names the pool it took. */
  async #askAuto(mode, body, signal) {
    setText(this.auto, "Asking ...");
    try {
      const response = await this.#app.server.ask("POST", mode.path, {
        body,
        headers: { "x-emo-pool": "auto" },
        signal,
      });
      await response.text();
      setText(this.auto, `For this prompt: ${response.headers.get("x-emo-pool")}.`);
    } catch (error) {
      setText(this.auto, error.name === "AbortError" ? "Stopped." : `No pool: ${error.message}`);
    }
  }

  #say(text, isError = false) {
    setText(this.said, text);
    this.said.classList.toggle("error", isError);
  }
}

/** One pool's answer, and how it came. */
class Answer {
  constructor(pool) {
    this.pool = pool;
    this.state = el("span", { class: "state", "data-state": "waiting" }, "waiting");
    this.text = el("pre", { class: "text", tabindex: "0", "aria-label": `Answer of ${pool}` });
    this.figures = {};
    const list = el("dl", { class: "figures small" });
    for (const [key, title] of [
      ["ttft", "First token"],
      ["speed", "Tokens per s"],
      ["tokens", "Tokens"],
      ["coverage", "Coverage"],
    ]) {
      this.figures[key] = el("dd", {}, "-");
      list.append(el("div", {}, el("dt", {}, title), this.figures[key]));
    }
    this.served = el("span", { class: "about" });
    this.element = el(
      "article",
      { class: "answer", "aria-label": `Answer of ${pool}` },
      el("header", {}, el("h3", {}, pool), this.served, this.state),
      this.text,
      list,
    );
  }

  async run(server, mode, body, signal) {
    const start = performance.now();
    this.first = this.last = null;
    try {
      const response = await server.ask("POST", mode.path, {
        body: { ...body, stream: true, stream_options: { include_usage: true } },
        headers: { "x-emo-pool": this.pool, "x-emo-coverage": "true" },
        signal,
      });
      const served = response.headers.get("x-emo-pool");
      if (served && served !== this.pool) setText(this.served, `by ${served}`);
      this.#set("running");
      for await (const { data } of eventsOf(response)) {
        if (data !== "[DONE]") this.#take(JSON.parse(data), mode, start);
      }
      this.#set("done");
    } catch (error) {
      if (error.name === "AbortError") this.#set("stopped");
      else this.#fail(error.message);
    }
  }

  #take(chunk, mode, start) {
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices?.map(mode.text).join("") ?? "";
    if (text) {
      this.last = performance.now();
      this.first ??= this.last;
      this.text.append(text);
      setText(this.figures.ttft, seconds((this.first - start) / 1000));
    }
    if (chunk.usage) {
      const tokens = chunk.usage.completion_tokens;
      setText(this.figures.tokens, count(tokens));
      const passed = (this.last - this.first) / 1000;
      if (tokens > 1 && passed > 0) setText(this.figures.speed, figure((tokens - 1) / passed));
    }
    if (chunk.emo_serve) setText(this.figures.coverage, percent(chunk.emo_serve.coverage));
  }

  #set(state) {
    this.state.dataset.state = state;
    setText(this.state, state);
  }

  #fail(message) {
    this.#set("failed");
    this.text.append(el("span", { class: "error" }, message));
  }
}
