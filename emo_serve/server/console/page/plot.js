// Points of several series on two axes, as SVG; series differ in dash and mark as well as in name.

import { el, newId, setText, svg } from "./dom.js";
import { roundUp } from "./chart.js";

const [WIDTH, HEIGHT] = [640, 300];
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 120, 12, 40]; // on the right are names
const LINE = 14; // between two names
const DASHES = ["", "6 4", "2 3", "10 3 2 3"];
const MARKS = [
  (x, y) => `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`,
  (x, y) => `M${x - 4} ${y - 4}h8v8h-8z`,
  (x, y) => `M${x} ${y - 5}l5 9h-10z`,
  (x, y) => `M${x} ${y - 5}l5 5l-5 5l-5 -5z`,
];

export class Plot {
  #options;

  /**
   * `options` are `{title, x, y, formatX, formatY, roundX}`: both axes' titles, how to write them,
   * and what number the x axis ends at, given the largest.
   */
  constructor(options) {
    this.#options = { roundX: roundUp, ...options };
    const id = newId("plot");
    this.words = svg("title", { id }, options.title);
    this.body = svg("g");
    this.drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      "aria-labelledby": id,
    });
    this.drawing.append(
      this.words,
      svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }),
      svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, options.x),
      svg("text", { x: 4, y: HEIGHT - 6 }, options.y),
      this.body,
    );
    this.element = el("div", { class: "plot" }, this.drawing);
  }

  /** Show series `{name, points}` of points `{x, y, label}`; x begins at zero, y near its least. */
  show(series) {
    const points = series.flatMap((one) => one.points);
    const { title, formatX, formatY, roundX } = this.#options;
    this.body.replaceChildren();
    setText(
      this.words,
      points.length ? `${title}: ${series.map(inWords(formatX, formatY)).join("; ")}` : title,
    );
    if (!points.length) return;
    const mostX = roundX(Math.max(...points.map((point) => point.x)));
    const ticks = ticksOf(points.map((point) => point.y));
    const [low, high] = [ticks[0], ticks.at(-1)];
    const x = (value) => LEFT + (value / mostX) * (WIDTH - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
    for (const tick of ticks) {
      this.body.append(
        svg("path", { class: "rule", d: `M${LEFT} ${y(tick)}H${WIDTH - RIGHT}` }),
        svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, formatY(tick)),
      );
    }
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = part ? "middle" : "start"; // beside the lowest number of the other axis
      const place = { x: x(part * mostX), y: HEIGHT - BOTTOM + 16, "text-anchor": anchor };
      this.body.append(svg("text", place, formatX(part * mostX)));
    }
    const ends = series.map((one, place) => this.#draw(one, place, x, y));
    this.#name(ends);
  }

  /** Draw a series; return its name and where it ends. */
  #draw({ name, points }, place, x, y) {
    const sorted = [...points].sort((a, b) => a.x - b.x);
    const path = sorted.map((point, at) => `${at ? "L" : "M"}${x(point.x)} ${y(point.y)}`).join("");
    const mark = MARKS[place % MARKS.length];
    this.body.append(
      svg("path", { class: "line", d: path, "stroke-dasharray": DASHES[place % DASHES.length] }),
    );
    for (const point of sorted) {
      const made = svg("path", { class: "mark", d: mark(x(point.x), y(point.y)) });
      made.append(svg("title", {}, point.label));
      this.body.append(made);
    }
    const last = sorted.at(-1);
    return { name, x: x(last.x), y: y(last.y) };
  }

  /** Write the names to the right of the ends, each below the one before. */
  #name(ends) {
    let lowest = -LINE;
    for (const end of [...ends].sort((a, b) => a.y - b.y)) {
      lowest = Math.max(end.y + 4, lowest + LINE);
      this.body.append(svg("text", { class: "name", x: end.x + 10, y: lowest }, end.name));
    }
  }
}

/** Return numbers that are easy to read, from below the least of these to above the largest. */
function ticksOf(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = roundUp((most - least || Math.abs(most) || 1) / 4);
  const [first, last] = [Math.floor(least / step), Math.ceil(most / step)];
  const count = Math.max(last - first, 1);
  return Array.from({ length: count + 1 }, (_, place) => (first + place) * step);
}

function inWords(formatX, formatY) {
  return ({ name, points }) =>
    `${name} ${points.map((p) => `${formatY(p.y)} at ${formatX(p.x)}`).join(", ")}`;
}
