// The HTTP API of the server that this page came from. The key is kept in this object and nowhere
// else: closing the tab forgets it.

/** An answer that is not what was asked for; `status` is 0 if there was no answer at all. */
export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function errorOf(response) {
  let message = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.message ?? body.detail ?? message;
  } catch {
    // no JSON: the status says all there is
  }
  const retryAfter = response.headers.get("retry-after");
  return new ServerError(response.status, String(message), retryAfter);
}

export class Server extends EventTarget {
  #key = "";
  #root = new URL("../", import.meta.url); // whatever path a proxy has put before it

  get hasKey() {
    return this.#key !== "";
  }

  /** Use another key from now on; "" for none. */
  setKey(key) {
    this.#key = key;
    this.dispatchEvent(new Event("key"));
  }

  /** Send a request; return the response if it is a success, else throw a ServerError. */
  async ask(method, path, { body, headers = {}, signal } = {}) {
    const all = { ...headers };
    if (this.#key) all.authorization = `Bearer ${this.#key}`;
    if (body !== undefined) all["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, this.#root), {
        method,
        headers: all,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, "the server does not answer");
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  /** Send a request and return the JSON of the answer. */
  async json(method, path, options) {
    return (await this.ask(method, path, options)).json();
  }
}

/** The path of one pool, or of what is below it. */
export function poolPath(name, ...rest) {
  return ["v1/pools", encodeURIComponent(name), ...rest].join("/");
}

/** Yield the server-sent events of a response as `{event, data}`; throws if it breaks off. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const fields = { event: "message", data: "" };
        for (const line of event.split("\n")) {
          const place = line.indexOf(":");
          if (place > 0) fields[line.slice(0, place)] = line.slice(place + 1).trimStart();
        }
        if (fields.data) yield fields;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "the connection broke off");
  } finally {
    reader.cancel().catch(() => {});
  }
}
