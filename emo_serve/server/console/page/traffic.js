// Requests, tokens, times and refusals over the last minutes, from the server's own metrics. They
// are asked for only while this view is seen.

import { TimeChart } from "./chart.js";
import { el, setText, table } from "./dom.js";
import { count, figure, percent, seconds } from "./format.js";
import { growth, labelValues, parseMetrics, total } from "./metrics.js";

const PAUSE = 5000;
const WINDOW = 600; // seconds
const FIRST = "vllm:time_to_first_token_seconds";

/** Each reads a value from two readings, `passed` seconds apart; null where nothing happened. */
const CHARTS = [
  [
    "Requests per second",
    figure,
    (a, b, passed) => growth(a, b, "emo_serve_requests_total") / passed,
  ],
  [
    "Generated tokens per second",
    figure,
    (a, b, passed) => growth(a, b, "emo_serve_generation_tokens_total") / passed,
  ],
  [
    "Mean time to first token",
    seconds,
    (a, b) => ratio(growth(a, b, `${FIRST}_sum`), growth(a, b, `${FIRST}_count`)),
  ],
  ["Hit rate", (share) => percent(share, 0), hitRate],
  ["Requests waiting for a pool", figure, (a, b) => total(b, "emo_serve_waiting_requests")],
  [
    "Refusals per minute",
    figure,
    (a, b, passed) => (60 * growth(a, b, "emo_serve_refused_requests_total")) / passed,
  ],
];

const POOL_COLUMNS = [
  ["Pool"],
  ["Requests", true],
  ["Prompt tokens", true],
  ["Generated tokens", true],
  ["Hit rate", true],
];
const REFUSAL_COLUMNS = [
  ["Reason"],
  ["Refused since the server started", true],
  ["In these minutes", true],
];

function ratio(part, whole) {
  return whole > 0 ? part / whole : null;
}

function hitRate(a, b) {
  const hits = growth(a, b, "emo_serve_pool_hits_total");
  return ratio(hits, hits + growth(a, b, "emo_serve_pool_misses_total"));
}

export class Traffic {
  static path = "traffic";
  static title = "Traffic";

  #app;
  #readings = []; // {time, samples}, the oldest first
  #timer = null;

  constructor(app, root) {
    this.#app = app;
    this.said = el("p", { class: "quiet", role: "status" }, "Asking ...");
    this.charts = CHARTS.map(([title, format, read]) => ({
      chart: new TimeChart(title, format),
      read,
    }));
    const pools = table("Pools", POOL_COLUMNS);
    const refusals = table("Refusals", REFUSAL_COLUMNS);
    this.pools = pools.body;
    this.refusals = refusals.body;
    this.noRefusals = el("p", {}, "Nothing was refused.");
    root.append(
      this.said,
      el("div", { class: "charts" }, ...this.charts.map(({ chart }) => chart.element)),
      el(
        "section",
        {},
        el("h2", {}, "Pools in these minutes"),
        el("div", { class: "scroller" }, pools.table),
      ),
      el(
        "section",
        {},
        el("h2", {}, "Refusals"),
        this.noRefusals,
        el("div", { class: "scroller" }, refusals.table),
      ),
    );
    this.refusalTable = refusals.table;
    document.addEventListener("visibilitychange", () => this.#timer !== null && this.#ask());
  }

  show() {
    this.#timer ??= setInterval(() => this.#ask(), PAUSE);
    this.#ask();
  }

  hide() {
    clearInterval(this.#timer);
    this.#timer = null;
  }

  async #ask() {
    if (document.hidden) return;
    try {
      const response = await this.#app.server.ask("GET", "metrics");
      const time = performance.now() / 1000;
      this.#readings.push({ time, samples: parseMetrics(await response.text()) });
      while (this.#readings[0].time < time - WINDOW) this.#readings.shift();
      const minutes = Math.max(1, Math.round((time - this.#readings[0].time) / 60));
      setText(
        this.said,
        `Since this view was opened, the last ${WINDOW / 60} minutes at most (now ${minutes} min); asked for every ${PAUSE / 1000} s.`,
      );
      this.#draw();
    } catch (error) {
      setText(this.said, `The metrics cannot be read: ${error.message}`);
    }
  }

  #draw() {
    const readings = this.#readings;
    for (const { chart, read } of this.charts) {
      const points = readings.slice(1).map((reading, place) => {
        const before = readings[place];
        const passed = reading.time - before.time;
        return { time: reading.time, value: read(before.samples, reading.samples, passed) };
      });
      chart.show(points, WINDOW);
    }
    this.#drawPools(readings[0].samples, readings.at(-1).samples);
    this.#drawRefusals(readings[0].samples, readings.at(-1).samples);
  }

  #drawPools(before, after) {
    const rows = labelValues(after, "emo_serve_requests_total", "pool").map((pool) => {
      const by = (name) => growth(before, after, name, { pool });
      const hits = by("emo_serve_pool_hits_total");
      const rate = ratio(hits, hits + by("emo_serve_pool_misses_total"));
      return [
        pool,
        by("emo_serve_requests_total"),
        by("emo_serve_prompt_tokens_total"),
        by("emo_serve_generation_tokens_total"),
        rate,
      ];
    });
    rows.sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]));
    this.pools.replaceChildren(
      ...rows.map(([pool, ...figures]) => {
        const rate = figures.pop();
        return rowOf(POOL_COLUMNS, [pool, ...figures.map(count), percent(rate, 0)]);
      }),
    );
  }

  #drawRefusals(before, after) {
    const name = "emo_serve_refused_requests_total";
    const reasons = labelValues(after, name, "reason").filter((reason) =>
      total(after, name, { reason }),
    );
    this.noRefusals.hidden = reasons.length > 0;
    this.refusalTable.hidden = reasons.length === 0;
    this.refusals.replaceChildren(
      ...reasons.map((reason) => {
        const [all, now] = [
          total(after, name, { reason }),
          growth(before, after, name, { reason }),
        ];
        return rowOf(REFUSAL_COLUMNS, [reason, count(all), count(now)]);
      }),
    );
  }
}

function rowOf(columns, texts) {
  const cells = texts.map((text, place) => {
    const [title, isNumber] = columns[place];
    const attributes = { "data-label": title, class: isNumber ? "number" : null };
    if (place === 0) return el("th", { ...attributes, role: "rowheader", scope: "row" }, text);
    return el("td", { ...attributes, role: "cell" }, text);
  });
  return el("tr", { role: "row" }, ...cells);
}
