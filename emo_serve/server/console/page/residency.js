// What sits in device memory: the slab as a map of layers x slots, the pools as a table with the
// operator's actions, and who waits for what.

import { el, field, newId, setShown, setText, table } from "./dom.js";
import { count, plural, size } from "./format.js";
import { Grid } from "./grid.js";
import { COLUMNS, PoolRow, roomReason } from "./poolrow.js";
import { poolPath } from "./server.js";
import { KINDS, countSlots, describe, readSlots } from "./slots.js";

export class Residency {
  static path = "residency";
  static title = "Residency";

  #app;
  #grid;
  #rows = new Map(); // by name
  #isShown = false;
  #highlighted = "";

  constructor(app, root) {
    this.#app = app;
    this.#grid = new Grid("Slots", (...cell) => this.#drawSlot(...cell), describe);
    root.append(this.#makeSummary(), this.#makeMap(), this.#makeWaiting(), this.#makePools());
    app.live.addEventListener("pools", () => this.#update());
    app.live.addEventListener("slots", () => this.#update());
    app.changes.addEventListener("access", () => this.#update());
    app.changes.addEventListener("theme", () => this.#grid.paint());
    setInterval(() => this.#isShown && this.#updateTimes(), 5000);
  }

  show() {
    this.#isShown = true;
    this.#update();
  }

  hide() {
    this.#isShown = false;
  }

  // -- parts --

  #makeSummary() {
    this.figures = {};
    const list = el("dl", { class: "figures" });
    for (const [key, title] of [
      ["slots", "Slots in use"],
      ["bytes", "Experts in memory"],
      ["resident", "Pools resident"],
      ["running", "Requests running"],
      ["waiting", "Requests waiting"],
    ]) {
      this.figures[key] = el("dd", {}, "-");
      list.append(el("div", {}, el("dt", {}, title), this.figures[key]));
    }
    return list;
  }

  #makeMap() {
    const id = newId("highlight");
    this.highlight = el("select", { id }, el("option", { value: "" }, "none"));
    this.highlight.addEventListener("change", () => {
      this.#highlighted = this.highlight.value;
      this.#grid.paint();
    });
    this.legend = {};
    const legend = el("ul", { class: "legend" });
    for (const [kind, words] of KINDS) {
      this.legend[kind] = el("span", { class: "count" }, "0");
      const swatch = el("span", { class: `swatch ${kind}`, "aria-hidden": "true" });
      legend.append(el("li", {}, swatch, `${words} `, this.legend[kind]));
    }
    return el(
      "section",
      { "aria-labelledby": "slots-title" },
      el(
        "div",
        { class: "heading" },
        el("h2", { id: "slots-title" }, "Slots"),
        field(id, "Outline the slots of", this.highlight),
      ),
      el(
        "p",
        { class: "quiet" },
        "Rows are layers, columns are slots. Move over the map, or focus it and use the arrow keys.",
      ),
      this.#grid.element,
      legend,
    );
  }

  #makeWaiting() {
    this.waiting = el("p", {}, "Nobody waits.");
    return el("section", {}, el("h2", {}, "Waiting"), this.waiting);
  }

  #makePools() {
    const id = newId("filter");
    this.filter = el("input", { id, type: "search", autocomplete: "off", spellcheck: "false" });
    this.filter.addEventListener("input", () => this.#update());
    const { table: made, body } = table("Pools", COLUMNS);
    this.body = body;
    this.refusal = el("p", { id: "refusal", class: "quiet" });
    this.result = el("p", { class: "result", role: "status" });
    this.refused = el("ul", { class: "quiet" });
    return el(
      "section",
      {},
      el(
        "div",
        { class: "heading" },
        el("h2", {}, "Pools"),
        field(id, "Filter", this.filter),
      ),
      this.refusal,
      this.result,
      el("div", { class: "scroller" }, made),
      this.refused,
    );
  }

  // -- what changes --

  #update() {
    const { pools, slots } = this.#app.live;
    if (!this.#isShown || pools === null || slots === null) return;
    this.#updateFigures(pools);
    this.#updateMap(slots, pools);
    this.#updateWaiting(pools);
    this.#updatePools(pools, slots);
  }

  #updateFigures(pools) {
    const { slots } = pools;
    const resident = pools.data.filter((card) => card.resident).length;
    const total = slots.total * slots.bytes_per_slot;
    setText(this.figures.slots, `${count(slots.used)} of ${count(slots.total)}`);
    setText(this.figures.bytes, `${size(slots.used_bytes)} of ${size(total)}`);
    setText(this.figures.resident, `${count(resident)} of ${count(pools.data.length)}`);
    setText(this.figures.running, count(pools.running_requests));
    setText(this.figures.waiting, count(pools.waiting_requests));
  }

  #updateMap(slots, pools) {
    const layers = readSlots(slots, pools);
    const counts = countSlots(layers);
    for (const [kind] of KINDS) setText(this.legend[kind], count(counts[kind]));
    const words = KINDS.map(([kind, meaning]) => `${counts[kind]} ${meaning}`).join("; ");
    const rows = layers.map(({ layer, slots: values }) => ({ label: String(layer), values }));
    this.#grid.show(rows, `${plural(layers.length, "layer")} of slots: ${words}`);
    this.#updateOptions(slots);
  }

  #updateOptions(slots) {
    const wanted = ["", ...slots.pools.map((pool) => pool.name)];
    const there = Array.from(this.highlight.options, (option) => option.value);
    if (wanted.join("\n") === there.join("\n")) return;
    if (!wanted.includes(this.#highlighted)) this.#highlighted = "";
    this.highlight.replaceChildren(
      ...wanted.map((name) => el("option", { value: name }, name || "none")),
    );
    this.highlight.value = this.#highlighted;
  }

  #updateWaiting(pools) {
    const waiting = pools.data.filter((card) => card.waiting_requests);
    const words = waiting.map((card) => {
      const what = card.state === "loading" ? "which is being loaded" : `which is ${card.state}`;
      const verb = card.waiting_requests === 1 ? "waits" : "wait";
      return `${plural(card.waiting_requests, "request")} ${verb} for ${card.name}, ${what}`;
    });
    setText(this.waiting, words.length ? `${words.join("; ")}.` : "Nobody waits.");
  }

  #updatePools(pools, slots) {
    const { refusal } = this.#app;
    setText(this.refusal, refusal === null ? "" : `Pools cannot be changed here: ${refusal}.`);
    setShown(this.refusal, refusal !== null);
    const filter = this.filter.value.trim().toLowerCase();
    const names = new Set();
    pools.data.forEach((card, place) => {
      names.add(card.name);
      const row = this.#rows.get(card.name) ?? this.#makeRow(card.name);
      row.update(card, refusal, roomReason(card, slots));
      setShown(row.element, !filter || card.name.includes(filter));
      if (this.body.children[place] !== row.element) {
        this.body.insertBefore(row.element, this.body.children[place] ?? null);
      }
    });
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.#rows.delete(name);
    }
    const refused = pools.refused.map((text) => el("li", {}, `Not served: ${text}`));
    if (refused.length !== this.refused.children.length) this.refused.replaceChildren(...refused);
  }

  #updateTimes() {
    for (const row of this.#rows.values()) row.updateTime();
  }

  #makeRow(name) {
    const row = new PoolRow(name, (verb) => this.#act(verb, name));
    this.#rows.set(name, row);
    return row;
  }

  // -- what the operator does --

  async #act(verb, name) {
    const card = this.#app.live.card(name);
    if (!card || !(await this.#isMeant(verb, card))) return;
    const row = this.#rows.get(name);
    row?.setBusy(verb);
    this.#say(`${name}: ${verb} ...`);
    try {
      if (verb === "remove") await this.#app.server.ask("DELETE", poolPath(name));
      else {
        const body = verb === "evict" ? { drain: card.running_requests > 0 } : {};
        await this.#app.server.ask("POST", poolPath(name, verb), { body });
      }
      this.#say(`${name}: ${verb} done.`);
    } catch (error) {
      this.#say(`${name}: ${verb} failed: ${error.message}`, true);
    } finally {
      row?.setBusy(null);
      this.#update();
    }
  }

  #isMeant(verb, card) {
    if (verb === "remove") {
      const file = card.persisted ? "Its file is deleted." : "It has no file.";
      const text = `The pool's definition is forgotten; running requests finish. ${file}`;
      return this.#app.dialogs.confirm(`Remove ${card.name}?`, text, "Remove");
    }
    if (verb === "evict" && card.running_requests) {
      const running = plural(card.running_requests, "request");
      const text = `It has ${running} running. It takes no new ones, and is evicted when they have ended.`;
      return this.#app.dialogs.confirm(`Evict ${card.name}?`, text, "Drain and evict");
    }
    return true;
  }

  #say(text, isError = false) {
    setText(this.result, text);
    this.result.classList.toggle("error", isError);
  }

  #drawSlot(context, x, y, side, slot, colors) {
    drawSlot(context, x, y, side, slot, colors);
    if (this.#highlighted && slot.pools.some((pool) => pool.name === this.#highlighted)) {
      context.strokeStyle = colors.text;
      context.lineWidth = Math.max(1, side / 8);
      context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
    }
  }
}

/** Paint one slot: kinds differ in filling and pattern, not in colour alone. */
function drawSlot(context, x, y, side, slot, colors) {
  if (slot.kind === "one" || slot.kind === "shared") {
    context.fillStyle = slot.kind === "one" ? colors.tint : colors.accent;
    context.fillRect(x, y, side, side);
  } else {
    context.strokeStyle = slot.kind === "free" ? colors.line : colors.accent;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
  }
  if (slot.kind === "loading") {
    context.beginPath();
    context.moveTo(x, y + side);
    context.lineTo(x + side, y);
    context.moveTo(x, y + side / 2);
    context.lineTo(x + side / 2, y);
    context.moveTo(x + side / 2, y + side);
    context.lineTo(x + side, y + side / 2);
    context.stroke();
  }
  if (slot.isLeased) {
    const inner = Math.max(2, Math.round(side / 2.5));
    const start = (side - inner) / 2;
    context.fillStyle = slot.kind === "shared" ? colors.surface : colors.text;
    context.fillRect(x + start, y + start, inner, inner);
  }
}
