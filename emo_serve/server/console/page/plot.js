// Points of several series on two axes, as SVG; series differ in dash and mark as well as in name.

import { el, newId, setText, svg } from "./dom.js";
import { roundUp } from "./chart.js";

const [WIDTH, HEIGHT] = [640, 300];
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 16, 12, 40];
const DASHES = ["", "6 4", "2 3", "10 3 2 3"];
const MARKS = [
  (x, y) => `M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`,
  (x, y) => `M${x - 4} ${y - 4}h8v8h-8z`,
  (x, y) => `M${x} ${y - 5}l5 9h-10z`,
  (x, y) => `M${x} ${y - 5}l5 5l-5 5l-5 -5z`,
];

export class Plot {
  #options;

  /** `options` are `{title, x, y, formatX, formatY}`: both axes' titles, and how to write them. */
  constructor(options) {
    this.#options = options;
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
    const { title, formatX, formatY } = this.#options;
    this.body.replaceChildren();
    setText(
      this.words,
      points.length ? `${title}: ${series.map(inWords(formatX, formatY)).join("; ")}` : title,
    );
    if (!points.length) return;
    const mostX = roundUp(Math.max(...points.map((point) => point.x)));
    const [low, high] = rangeOf(points.map((point) => point.y));
    const x = (value) => LEFT + (value / mostX) * (WIDTH - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - TOP);
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      const [atX, atY] = [part * mostX, low + part * (high - low)];
      this.body.append(
        svg("path", { class: "rule", d: `M${LEFT} ${y(atY)}H${WIDTH - RIGHT}` }),
        svg("text", { x: LEFT - 6, y: y(atY) + 4, "text-anchor": "end" }, formatY(atY)),
        svg("text", { x: x(atX), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, formatX(atX)),
      );
    }
    series.forEach((one, place) => this.#draw(one, place, x, y));
  }

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
    const anchor = x(last.x) > WIDTH - 120 ? "end" : "start";
    const shift = anchor === "end" ? -8 : 8;
    this.body.append(
      svg(
        "text",
        { class: "name", x: x(last.x) + shift, y: y(last.y) - 8, "text-anchor": anchor },
        name,
      ),
    );
  }
}

function rangeOf(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const margin = (most - least || Math.abs(most) || 1) * 0.1;
  return [least - margin, most + margin];
}

function inWords(formatX, formatY) {
  return ({ name, points }) =>
    `${name} ${points.map((p) => `${formatY(p.y)} at ${formatX(p.x)}`).join(", ")}`;
}
