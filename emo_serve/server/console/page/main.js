// The frame of the page: which view is shown, the key, the theme, and whether the server answers.

import { Dialogs } from "./dialogs.js";
import { el, setShown, setText } from "./dom.js";
import { Live } from "./live.js";
import { Memory } from "./memory.js";
import { Playground } from "./playground.js";
import { Pool } from "./pool.js";
import { Residency } from "./residency.js";
import { Server } from "./server.js";
import { Traffic } from "./traffic.js";

const VIEWS = [Residency, Pool, Memory, Playground, Traffic];
const READY_PAUSE = 15_000;

/** What every view is given. */
class Console {
  server = new Server();
  live = new Live(this.server);
  dialogs = new Dialogs();
  /** What the key opens: the answer of GET /v1/access; null before the first. */
  access = null;
  /** Told when `access` or the theme has changed. */
  changes = new EventTarget();

  /** Why pools cannot be changed; null if they can. */
  get refusal() {
    if (this.access === null) return "the server has not said yet what the key opens";
    return this.access.refusal;
  }
}

const app = new Console();
const byId = (id) => document.getElementById(id);
const [main, status, notice] = [byId("main"), byId("status"), byId("notice")];

// -- views --

const views = new Map();
for (const View of VIEWS) {
  const link = el("a", { href: `#${View.path}` }, View.title);
  byId("nav").append(link);
  views.set(View.path, { View, link, section: null, view: null });
}
let shown = null;

function show() {
  const [path, ...rest] = location.hash.slice(1).split("/");
  const entry = views.get(path) ?? views.get(VIEWS[0].path);
  if (entry.section === null) {
    const title = el("h1", {}, entry.View.title);
    entry.section = el("section", { class: "view" }, title);
    entry.view = new entry.View(app, entry.section);
    main.append(entry.section);
  }
  for (const other of views.values()) {
    if (other.section) setShown(other.section, other === entry);
    if (other === entry) other.link.setAttribute("aria-current", "page");
    else other.link.removeAttribute("aria-current");
  }
  document.title = `${entry.View.title} - emo-serve`;
  if (shown !== entry) shown?.view.hide?.();
  shown = entry;
  entry.view.show(rest.map(decodeURIComponent).join("/"));
}
addEventListener("hashchange", show);

// -- theme --

const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null; // "light", "dark", or the system's

function paint() {
  const isDark = chosen === null ? dark.matches : chosen === "dark";
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(isDark));
  app.changes.dispatchEvent(new Event("theme"));
}
byId("theme").addEventListener("click", () => {
  chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint();
});
dark.addEventListener("change", paint);
paint();

// -- key --

async function askAccess() {
  try {
    app.access = await app.server.json("GET", "v1/access");
  } catch {
    app.access = null;
  }
  const words = { api: "Key: API", admin: "Key: admin", unknown: "Key: unknown", none: "Key" };
  setText(byId("key"), words[app.access?.key] ?? "Key");
  app.changes.dispatchEvent(new Event("access"));
}

async function askKey(text) {
  const key = await app.dialogs.askKey(text);
  if (key !== null) app.server.setKey(key);
}
byId("key").addEventListener("click", () => {
  askKey(
    app.refusal === null
      ? "This server takes what you have."
      : `Without another key: ${app.refusal}.`,
  );
});
app.server.addEventListener("key", askAccess);

// -- is the server there --

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  lost: "No connection",
  refused: "Key needed",
};

function tell() {
  const { status: now, reason } = app.live;
  status.dataset.status = now;
  setText(status, WORDS[now]);
  if (now === "lost") say(`No connection: ${reason}. What you see is old; trying again.`);
  else if (now === "refused") say(`The server needs a key: ${reason}.`);
  else say("");
  if (now === "refused")
    askKey(app.server.hasKey ? "The server does not know this key." : "This server needs a key.");
  if (now === "live") {
    if (app.access === null) askAccess();
    askReady();
  }
}

function say(text) {
  setText(notice, text);
  setShown(notice, text !== "");
}

async function askReady() {
  if (app.live.status !== "live") return;
  try {
    await app.server.ask("GET", "ready");
    say("");
  } catch (error) {
    const reason = app.live.status === "live" && error.status === 503 ? error.message : null;
    if (reason !== null) say(`The server takes no new requests: ${reason}.`);
  }
}
app.live.addEventListener("status", tell);
setInterval(askReady, READY_PAUSE);

tell();
show();
app.live.restart();
