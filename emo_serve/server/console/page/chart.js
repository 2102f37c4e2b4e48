// One line over time as SVG: a title, the newest value, an axis that begins at zero.

import { el, newId, setText, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [360, 110];
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 8, 8, 20];

/** Return a number at least as large, of one figure that is easy to read. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.9999);
}

/** Show how one number has moved; `format` writes it. */
export class TimeChart {
  #format;

  constructor(title, format) {
    this.#format = format;
    this.title = title;
    const id = newId("chart");
    this.now = el("strong", { class: "now" }, "-");
    this.drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      "aria-labelledby": id,
    });
    this.words = svg("title", { id }, title);
    this.axis = svg("path", {
      class: "axis",
      d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}`,
    });
    this.line = svg("path", { class: "line" });
    this.top = svg("text", { x: LEFT - 6, y: TOP + 8, "text-anchor": "end" });
    const zero = svg("text", { x: LEFT - 6, y: HEIGHT - BOTTOM, "text-anchor": "end" }, "0");
    this.from = svg("text", { x: LEFT, y: HEIGHT - 5 });
    const to = svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, "now");
    this.drawing.append(this.words, this.axis, this.line, this.top, zero, this.from, to);
    this.element = el(
      "figure",
      { class: "chart" },
      el("figcaption", {}, el("span", {}, title), this.now),
      this.drawing,
    );
  }

  /** Show points `{time, value}`, times in seconds, a null value where there was nothing. */
  show(points, seconds) {
    const values = points.map((point) => point.value).filter((value) => value !== null);
    const newest = points.at(-1)?.value ?? null;
    const most = roundUp(Math.max(0, ...values));
    const end = points.at(-1)?.time ?? 0;
    setText(this.now, newest === null ? "-" : this.#format(newest));
    setText(this.top, this.#format(most));
    setText(this.from, `${Math.round(seconds / 60)} min ago`);
    const x = (time) => WIDTH - RIGHT - ((end - time) / seconds) * (WIDTH - RIGHT - LEFT);
    const y = (value) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - BOTTOM - TOP);
    let path = "";
    let isOn = false;
    for (const { time, value } of points) {
      if (value !== null) path += `${isOn ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`;
      isOn = value !== null;
    }
    this.line.setAttribute("d", path);
    const range = values.length
      ? `now ${newest === null ? "nothing" : this.#format(newest)}, at most ${this.#format(Math.max(...values))}`
      : "nothing yet";
    setText(this.words, `${this.title}: ${range}`);
  }
}
