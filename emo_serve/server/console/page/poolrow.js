// One row of the table of pools: what it says, and which of its buttons work.

import { el, setShown, setText } from "./dom.js";
import { ago, count, percent, perLayer, size } from "./format.js";

const ACTIONS = [
  ["load", "Load", (card, room) => (card.state === "resident" ? "it is resident" : room)],
  ["evict", "Evict", (card) => (card.row === null ? "it is not resident" : pinnedReason(card))],
  ["pin", "Pin", (card, room) => (card.pinned ? "it is pinned" : room)],
  ["unpin", "Unpin", (card) => (card.pinned ? null : "it is not pinned")],
  ["remove", "Remove", removeReason],
];

/** The columns of the table: titles, and whether they hold numbers. */
export const COLUMNS = [
  ["Pool"],
  ["State"],
  ["Experts per layer", true],
  ["Size", true],
  ["Running", true],
  ["Waiting", true],
  ["Hits", true],
  ["Coverage", true],
  ["Last used", true],
  ["Actions"],
];

/** Why a pool can never be loaded; null if it can. */
export function roomReason(card, slots) {
  for (const [layer, needed] of card.experts_per_layer.entries()) {
    const there = slots.layers[layer]?.experts.length ?? 0;
    if (needed > there) return `it needs ${needed} slots in layer ${layer}, which has ${there}`;
  }
  return null;
}

/** Columns that take a whole line where rows are blocks. */
const WHOLE = new Set(["State", "Last used", "Actions"]);

function pinnedReason(card) {
  return card.pinned ? "it is pinned" : null;
}

function removeReason(card) {
  if (card.kind === "base") return "it is the model itself";
  if (card.kind === "union") return "a union is removed with its pools";
  return card.default ? "it is the default pool" : null;
}

/** One row of the table of pools; its elements stay while the pool does. */
export class PoolRow {
  constructor(name, act) {
    this.cells = COLUMNS.map(([title, isNumber], place) => {
      const kinds = [isNumber ? "number" : "", WHOLE.has(title) ? "whole" : ""].join(" ").trim();
      const role = place ? "cell" : "rowheader";
      const attributes = { role, "data-label": title, class: kinds || null };
      return el(place ? "td" : "th", place ? attributes : { ...attributes, scope: "row" });
    });
    const link = el("a", { href: `#pool/${encodeURIComponent(name)}` }, name);
    this.name = el("span", { class: "name" }, link);
    this.about = el("span", { class: "about" });
    this.cells[0].append(this.name, this.about);
    this.state = el("span", { class: "state" });
    this.cells[1].append(this.state);
    this.buttons = new Map();
    const actions = el("div", { class: "row-actions" });
    for (const [verb, title, reason] of ACTIONS) {
      const attributes = { type: "button", class: "small", "aria-label": `${title} ${name}` };
      const button = el("button", { ...attributes, on: { click: () => act(verb) } }, title);
      this.buttons.set(verb, { button, reason });
      actions.append(button);
    }
    this.cells[9].append(actions);
    this.element = el("tr", { role: "row", "data-pool": name }, ...this.cells);
    this.busy = null;
  }

  setBusy(verb) {
    this.busy = verb;
    if (this.card) this.update(this.card, this.refusal, this.room);
  }

  update(card, refusal, room) {
    this.card = card;
    this.refusal = refusal;
    this.room = room;
    const words = [card.description];
    if (card.default) words.unshift("default");
    setText(this.about, words.filter(Boolean).join(": "));
    this.state.dataset.state = card.state;
    setText(this.state, `${card.state}${card.pinned ? ", pinned" : ""}`);
    const asked = card.hits + card.misses;
    const hits = asked ? `${count(card.hits)} of ${count(asked)}` : "-";
    [
      perLayer(card.experts_per_layer),
      size(card.bytes),
      count(card.running_requests),
      count(card.waiting_requests),
      hits,
      percent(card.coverage),
    ].forEach((text, place) => setText(this.cells[2 + place], text));
    this.updateTime();
    for (const [verb, { button, reason }] of this.buttons) {
      const why = refusal ?? (this.busy ? `${this.busy} is under way` : reason(card, room));
      button.disabled = why !== null;
      button.title = why === null ? "" : `Not now: ${why}`;
      setShown(button, (verb !== "pin" || !card.pinned) && (verb !== "unpin" || card.pinned));
    }
  }

  updateTime() {
    if (this.card) setText(this.cells[8], ago(this.card.last_used));
  }
}
