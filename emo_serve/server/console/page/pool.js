// One pool: which experts it has and uses, which pools are like it, and other sizes of it.

import { Building } from "./building.js";
import { el, field, newId, setShown, setText, table } from "./dom.js";
import { count, percent, perLayer, size } from "./format.js";
import { Grid } from "./grid.js";
import { Plot } from "./plot.js";
import { overlap, together } from "./poolmaths.js";
import { poolPath } from "./server.js";

const FACTS = [
  ["state", "State"],
  ["experts", "Experts per layer"],
  ["size", "Size"],
  ["coverage", "Mean coverage"],
  ["found", "Found by"],
];
const LIKE_COLUMNS = [
  ["Pool"],
  ["Alike", true],
  ["Slots per layer together", true],
  ["Size together", true],
  ["More than this alone", true],
  ["Fit together"],
];

export class Pool {
  static path = "pool";
  static title = "Pool";

  #app;
  #grid;
  #name = null;
  #isShown = false;
  #known = ""; // what the list of all pools was made of

  constructor(app, root) {
    this.#app = app;
    this.#grid = new Grid("Experts", (...cell) => this.#drawExpert(...cell), describeExpert);
    root.append(
      this.#makeChoice(),
      this.#makeMap(),
      this.#makeLike(),
      this.#makeCut(),
      new Building(app, (name) => this.#go(name)).element,
    );
    app.live.addEventListener("pools", () => this.#isShown && this.#follow());
    app.changes.addEventListener("access", () => this.#updateCut());
    app.changes.addEventListener("theme", () => this.#grid.paint());
  }

  show(name) {
    this.#isShown = true;
    if (name) this.#name = name;
    this.#known = "";
    this.#follow();
  }

  hide() {
    this.#isShown = false;
  }

  #go(name) {
    location.hash = `#pool/${encodeURIComponent(name)}`;
  }

  // -- parts --

  #makeChoice() {
    const id = newId("pool");
    this.choice = el("select", { id });
    this.choice.addEventListener("change", () => this.#go(this.choice.value));
    this.keep = el(
      "button",
      { type: "button", on: { click: () => this.#export() } },
      "Export as JSON",
    );
    this.about = el("p", { class: "quiet" });
    this.said = el("p", { class: "result", role: "status" });
    this.facts = {};
    const list = el("dl", { class: "figures" });
    for (const [key, title] of FACTS) {
      this.facts[key] = el("dd", {}, "-");
      list.append(el("div", {}, el("dt", {}, title), this.facts[key]));
    }
    return el(
      "div",
      {},
      el("div", { class: "fields" }, field(id, "Pool", this.choice), this.keep),
      this.about,
      this.said,
      list,
    );
  }

  #makeMap() {
    this.usage = el("p", { class: "quiet" });
    const legend = el("ul", { class: "legend" });
    for (const [kind, words] of [
      ["free", "not in the pool"],
      ["one", "in the pool, hardly chosen"],
      ["shared", "in the pool, chosen most often in its layer"],
    ]) {
      legend.append(
        el("li", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), words),
      );
    }
    return el("section", {}, el("h2", {}, "Experts"), this.usage, this.#grid.element, legend);
  }

  #makeLike() {
    const { table: made, body } = table("Pools like this one", LIKE_COLUMNS);
    this.like = body;
    return el(
      "section",
      {},
      el("h2", {}, "Beside other pools"),
      el(
        "p",
        { class: "quiet" },
        "Alike: the experts that both have, of those that either has, mean over layers. Together they are the union of both.",
      ),
      el("div", { class: "scroller" }, made),
    );
  }

  #makeCut() {
    const [id, nameId] = [newId("cut"), newId("name")];
    this.plot = new Plot({
      title: "Share of the scores kept",
      x: "experts per layer",
      y: "share kept",
      formatX: (value) => String(Math.round(value)),
      formatY: (value) => percent(value, 0),
    });
    this.sizeInput = el("input", { id, type: "range", min: "1", max: "2", value: "1" });
    this.sizeInput.addEventListener("input", () => this.#updateCut());
    this.cutWords = el("output", { for: id });
    this.cutName = el("input", { id: nameId, spellcheck: "false", autocomplete: "off" });
    this.define = el(
      "button",
      { type: "button", on: { click: () => this.#cut() } },
      "Define this pool",
    );
    this.noCut = el("p", { class: "quiet" });
    this.cutBody = el(
      "div",
      {},
      this.plot.element,
      el(
        "div",
        { class: "fields" },
        field(id, "Experts per layer", this.sizeInput),
        this.cutWords,
      ),
      el(
        "div",
        { class: "fields" },
        field(nameId, "Name", this.cutName),
        this.define,
      ),
    );
    this.cutSaid = el("p", { class: "result", role: "status" });
    return el(
      "section",
      {},
      el("h2", {}, "Cut to another size"),
      this.noCut,
      this.cutBody,
      this.cutSaid,
    );
  }

  // -- what is shown --

  /** Read everything anew if pools were defined, removed or loaded, or another one is chosen. */
  async #follow() {
    const { pools } = this.#app.live;
    if (pools === null) return;
    const cards = pools.data;
    this.#name ??= (cards.find((card) => card.kind === "pool") ?? cards[0]).name;
    const card = this.#app.live.card(this.#name);
    if (card) this.#updateFacts(card);
    const known = JSON.stringify([this.#name, cards.map((one) => one.content_hash + one.name)]);
    if (known === this.#known) return;
    this.#known = known;
    const names = new Set([...cards.map((one) => one.name), this.#name]); // it may be a union
    this.choice.replaceChildren(...[...names].map((name) => el("option", { value: name }, name)));
    this.choice.value = this.#name;
    await this.#read(this.#name);
  }

  async #read(name) {
    const { server } = this.#app;
    this.#say("");
    try {
      const card = await server.json("GET", poolPath(name));
      const [all, usage, document] = await Promise.all([
        server.json("GET", "v1/pools?experts=true"),
        server.json("GET", poolPath(name, "usage")).catch((error) => error),
        card.kind === "union" ? null : server.json("GET", poolPath(name, "document")),
      ]);
      const hasScores = document?.layers.some((layer) => layer?.scores);
      const cuts = hasScores ? await server.json("GET", poolPath(name, "cuts")) : null;
      if (name !== this.#name) return; // another pool was chosen meanwhile
      this.document = document;
      this.keep.disabled = document === null;
      this.#showMap(card, usage, all.experts_per_layer);
      this.#showLike(card, all);
      this.#showCuts(card, cuts);
      this.#updateFacts(card);
    } catch (error) {
      this.#say(`The pool cannot be read: ${error.message}`, true);
    }
  }

  #updateFacts(card) {
    const made = this.document?.name === card.name ? this.document.calibration : null;
    const found = made && [
      made.method,
      made.documents && `${count(made.documents)} documents`,
      made.tokens && `${count(made.tokens)} tokens`,
    ];
    setText(this.about, card.description);
    setText(this.facts.state, `${card.state}${card.pinned ? ", pinned" : ""}`);
    setText(this.facts.experts, perLayer(card.experts_per_layer));
    setText(this.facts.size, size(card.bytes));
    setText(this.facts.coverage, percent(card.coverage));
    setText(this.facts.found, found ? found.filter(Boolean).join(", ") : "-");
  }

  #showMap(card, usage, counts) {
    const hasUsage = !(usage instanceof Error);
    setText(
      this.usage,
      hasUsage
        ? `Rows are layers, columns are experts; the stronger its colour, the more often one was chosen by ${count(usage.tokens)} tokens since the server started.`
        : `How often experts are chosen is not known: ${usage.message}`,
    );
    const rows = [];
    card.experts.forEach((ids, layer) => {
      if (!counts[layer]) return;
      const chosen = new Map();
      if (hasUsage)
        usage.layers[layer]?.experts.forEach((id, at) =>
          chosen.set(id, usage.layers[layer].counts[at]),
        );
      const most = Math.max(1, ...chosen.values());
      const all = Math.max(
        1,
        [...chosen.values()].reduce((sum, each) => sum + each, 0),
      );
      const mine = new Set(ids);
      const values = Array.from({ length: counts[layer] }, (_, expert) => {
        const times = chosen.get(expert) ?? 0;
        return { expert, isIn: mine.has(expert), times, heat: times / most, share: times / all };
      });
      rows.push({ label: String(layer), values });
    });
    const held = rows.reduce(
      (sum, row) => sum + row.values.filter((value) => value.isIn).length,
      0,
    );
    this.#grid.show(
      rows,
      `${rows.length} layers of experts, of which pool ${card.name} has ${held}`,
    );
  }

  #showLike(card, all) {
    const { slots } = this.#app.live;
    const room = slots?.layers.map((layer) => layer?.experts.length ?? 0) ?? null;
    const others = all.data.filter((other) => other.name !== card.name && other.kind === "pool");
    const rows = others.map((other) => {
      const both = together(card.experts, other.experts);
      const bytes = both.total * all.slots.bytes_per_slot;
      const fits = room === null || both.perLayer.every((needed, layer) => needed <= room[layer]);
      return { other, alike: overlap(card.experts, other.experts), both, bytes, fits };
    });
    rows.sort((a, b) => b.alike - a.alike || a.other.name.localeCompare(b.other.name));
    this.like.replaceChildren(
      ...rows.map(({ other, alike, both, bytes, fits }) => {
        const link = el("a", { href: `#pool/${encodeURIComponent(other.name)}` }, other.name);
        const texts = [
          percent(alike, 0),
          perLayer(both.perLayer),
          size(bytes),
          size(bytes - card.bytes),
          fits ? "yes" : "no",
        ];
        const cells = texts.map((text, place) => {
          const [title, isNumber] = LIKE_COLUMNS[place + 1];
          return el(
            "td",
            { role: "cell", "data-label": title, class: isNumber ? "number" : null },
            text,
          );
        });
        return el(
          "tr",
          { role: "row" },
          el("th", { role: "rowheader", scope: "row" }, link),
          ...cells,
        );
      }),
    );
  }

  // -- another size --

  #showCuts(card, cuts) {
    this.card = card;
    this.cuts = cuts?.data ?? [];
    setText(
      this.noCut,
      cuts === null
        ? "It cannot be cut: it has no scores, which pools found from examples have."
        : "The file has a score for every expert. Kept is their share, shared experts apart: for pools found by the router, the coverage on the texts the pool was found on.",
    );
    setShown(this.cutBody, this.cuts.length > 0);
    setText(this.cutSaid, "");
    if (!this.cuts.length) return;
    const points = this.cuts.map((one) => ({
      x: one.experts,
      y: one.share,
      label: `${one.experts} experts: ${percent(one.share)}`,
    }));
    this.plot.show([{ name: card.name, points }]);
    this.sizeInput.min = String(this.cuts[0].experts);
    this.sizeInput.max = String(this.cuts.at(-1).experts);
    this.sizeInput.value = String(Math.max(...card.experts_per_layer));
    this.#updateCut();
  }

  #updateCut() {
    const wanted = this.cuts?.find((one) => one.experts === Number(this.sizeInput.value));
    if (!wanted) return;
    const { refusal } = this.#app;
    setText(
      this.cutWords,
      `${wanted.experts} experts: ${percent(wanted.share)} kept, ${size(wanted.bytes)}`,
    );
    this.cutName.value = `${this.card.name}-k${wanted.experts}`;
    this.define.disabled = refusal !== null;
    this.define.title = refusal === null ? "" : `Not now: ${refusal}`;
  }

  async #cut() {
    const body = { name: this.cutName.value, experts: Number(this.sizeInput.value) };
    try {
      const made = await this.#app.server.json("POST", poolPath(this.card.name, "cut"), { body });
      this.#go(made.name);
    } catch (error) {
      setText(this.cutSaid, `Not defined: ${error.message}`);
      this.cutSaid.classList.add("error");
    }
  }

  #export() {
    const text = JSON.stringify(this.document, null, 1);
    const link = el("a", { download: `${this.document.name}.json` });
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.click();
    URL.revokeObjectURL(link.href);
  }

  #say(text, isError = false) {
    setText(this.said, text);
    this.said.classList.toggle("error", isError);
  }

  #drawExpert(context, x, y, side, value, colors) {
    if (!value.isIn) {
      context.strokeStyle = colors.line;
      context.lineWidth = 1;
      context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
      return;
    }
    context.fillStyle = colors.tint;
    context.fillRect(x, y, side, side);
    context.globalAlpha = value.heat;
    context.fillStyle = colors.accent;
    context.fillRect(x, y, side, side);
    context.globalAlpha = 1;
  }
}

function describeExpert(layer, value) {
  const place = `Layer ${layer}, expert ${value.expert}`;
  if (!value.isIn) return `${place}: not in the pool`;
  return `${place}: chosen ${count(value.times)} times, ${percent(value.share)} of its layer's choices`;
}
