// What the server says of its pools and slots, as it happens: one stream for all views of the page.
// When the stream ends it is opened again, after pauses that grow. While the tab is hidden there is
// none: browsers open six connections to a server at most, for all their tabs together.

import { eventsOf } from "./server.js";

const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 10_000;
const SILENCE = 40_000; // the server says something every 15 s

export class Live extends EventTarget {
  #server;
  #abort = null;
  #pause = FIRST_PAUSE;

  /** The newest list of pools, and map of slots; null before the first. */
  pools = null;
  slots = null;
  /** "connecting", "live", "lost" or "refused"; `reason` says why it is lost. */
  status = "connecting";
  reason = "";

  constructor(server) {
    super();
    this.#server = server;
    server.addEventListener("key", () => this.restart());
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#abort?.abort();
      else this.restart();
    });
  }

  /** Open the stream, anew if it is open. */
  restart() {
    this.#abort?.abort();
    this.#abort = new AbortController();
    this.#pause = FIRST_PAUSE;
    this.#run(this.#abort.signal);
  }

  async #run(signal) {
    while (!signal.aborted) {
      try {
        await this.#follow(signal);
        this.#set("lost", "the server has closed the connection");
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401) {
          this.#set("refused", error.message);
          return; // until there is another key
        }
        this.#set("lost", error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, this.#pause));
      this.#pause = Math.min(LONGEST_PAUSE, 2 * this.#pause);
    }
  }

  async #follow(signal) {
    const own = new AbortController();
    signal.addEventListener("abort", () => own.abort(), { signal: own.signal });
    let timer = setTimeout(() => own.abort(), SILENCE);
    try {
      const response = await this.#server.ask("GET", "v1/residency/events", { signal: own.signal });
      const heard = response.body.pipeThrough(
        new TransformStream({
          transform(chunk, controller) {
            clearTimeout(timer);
            timer = setTimeout(() => own.abort(), SILENCE);
            controller.enqueue(chunk);
          },
        }),
      );
      for await (const { event, data } of eventsOf({ body: heard })) {
        this[event] = JSON.parse(data);
        this.#pause = FIRST_PAUSE;
        this.#set("live", "");
        this.dispatchEvent(new Event(event));
      }
    } catch (error) {
      if (error.name === "AbortError" && !signal.aborted) throw new Error("the server is silent");
      throw error;
    } finally {
      clearTimeout(timer);
      own.abort();
    }
  }

  #set(status, reason) {
    if (status === this.status && reason === this.reason) return;
    this.status = status;
    this.reason = reason;
    this.dispatchEvent(new Event("status"));
  }

  /** Return the card of a pool by its name; undefined if there is none. */
  card(name) {
    return this.pools?.data.find((card) => card.name === name);
  }
}
