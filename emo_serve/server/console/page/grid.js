// A map of rows x columns on a canvas, with a cursor for mouse and keyboard and a line that says
// what is under it. Rows are layers; what a cell looks like is up to the view.

import { el, setText } from "./dom.js";

const LABEL = 34; // for the numbers of the rows
const HEAD = 16; // for the numbers of the columns
const LEAST = 5;
const MOST = 20;
const COLORS = ["accent", "tint", "line", "text", "quiet", "surface"];

export class Grid {
  #rows = [];
  #columns = 0;
  #cell = MOST;
  #cursor = null;
  #draw;
  #describe;

  /**
   * `draw(context, x, y, size, value, colors)` paints one cell, with colors by their names in the
   * style sheet; `describe(label, value)` says what it is.
   */
  constructor(name, draw, describe) {
    this.#draw = draw;
    this.#describe = describe;
    this.canvas = el("canvas", { role: "img", tabindex: "0", "aria-label": name });
    this.scroller = el("div", { class: "grid-scroller" }, this.canvas);
    this.readout = el("output", { class: "readout" }, "");
    this.element = el("div", { class: "grid" }, this.scroller, this.readout);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#move(null));
    this.canvas.addEventListener("keydown", (event) => this.#step(event));
    this.canvas.addEventListener("blur", () => this.#move(null));
    new ResizeObserver(() => this.paint()).observe(this.element);
  }

  /** Show these rows, each `{label, values}`; `summary` is read out in their place. */
  show(rows, summary) {
    this.#rows = rows;
    this.#columns = Math.max(0, ...rows.map((row) => row.values.length));
    this.canvas.setAttribute("aria-label", summary);
    this.paint();
  }

  /** Draw everything again. */
  paint() {
    const width = this.element.clientWidth;
    if (!width || !this.#columns) return;
    const room = Math.floor((width - LABEL) / this.#columns);
    this.#cell = Math.max(LEAST, Math.min(MOST, room));
    const [w, h] = [LABEL + this.#columns * this.#cell, HEAD + this.#rows.length * this.#cell];
    const scale = devicePixelRatio || 1;
    const { canvas } = this;
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(h * scale);
    canvas.style.width = `${w}px`;
    canvas.style.height = `${h}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const colors = this.#colors();
    this.#paintLabels(context, colors);
    this.#rows.forEach((row, y) => {
      row.values.forEach((value, x) => {
        this.#draw(
          context,
          LABEL + x * this.#cell,
          HEAD + y * this.#cell,
          this.#cell - 1,
          value,
          colors,
        );
      });
    });
    this.#paintCursor(context, colors);
  }

  #colors() {
    const style = getComputedStyle(this.element);
    const named = COLORS.map((name) => [name, style.getPropertyValue(`--${name}`)]);
    return { ...Object.fromEntries(named), font: style.fontFamily };
  }

  #paintLabels(context, colors) {
    context.fillStyle = colors.quiet;
    context.font = `10px ${colors.font}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(12 / this.#cell);
    this.#rows.forEach((row, y) => {
      if (y % every) return;
      context.fillText(row.label, LABEL - 6, HEAD + (y + 0.5) * this.#cell);
    });
    context.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32].find((each) => each * this.#cell >= 22) ?? 64;
    for (let x = 0; x < this.#columns; x += step) {
      context.fillText(String(x), LABEL + (x + 0.5) * this.#cell, HEAD / 2);
    }
  }

  #paintCursor(context, colors) {
    if (this.#cursor === null) return;
    const { x, y } = this.#cursor;
    context.strokeStyle = colors.text;
    context.lineWidth = 2;
    context.strokeRect(
      LABEL + x * this.#cell - 1,
      HEAD + y * this.#cell - 1,
      this.#cell + 1,
      this.#cell + 1,
    );
  }

  #point(event) {
    const x = Math.floor((event.offsetX - LABEL) / this.#cell);
    const y = Math.floor((event.offsetY - HEAD) / this.#cell);
    this.#move(this.#rows[y]?.values[x] === undefined ? null : { x, y });
  }

  #step(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const { x, y } = this.#cursor ?? { x: 0, y: 0 };
    const next = this.#cursor === null ? { x, y } : { x: x + step[0], y: y + step[1] };
    if (this.#rows[next.y]?.values[next.x] !== undefined) this.#move(next);
  }

  #move(cursor) {
    this.#cursor = cursor;
    const row = cursor && this.#rows[cursor.y];
    setText(this.readout, row ? this.#describe(row.label, row.values[cursor.x]) : "");
    this.paint();
  }
}
