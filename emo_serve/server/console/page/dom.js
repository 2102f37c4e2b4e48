// Elements made from texts. Nothing here, or anywhere else in the console, parses markup: what a
// server sends is set as text, so that it is shown as it is.

/**
 * Make an element.
 *
 * `attributes` are set as they are, but for `on`, which maps events to listeners; null, undefined
 * and false are left out. Children are elements, or texts.
 */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** Make an SVG element; attributes and children as for `el`. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Set an element's text, if it is another one: a page that changes nothing draws nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show or hide an element. */
export function setShown(element, isShown) {
  if (element.hidden === isShown) element.hidden = !isShown;
}

let numbers = 0;

/** Return an id that no other element has. */
export function newId(word) {
  numbers += 1;
  return `${word}-${numbers}`;
}

/** A control, which has this id, with its label before it. */
export function field(id, title, control) {
  return el("span", { class: "field" }, el("label", { for: id }, title), control);
}

/** A table with a caption for screen readers; columns are `[title, isNumber]`. */
export function table(caption, columns) {
  const head = el("tr", { role: "row" });
  for (const [title, isNumber] of columns) {
    const attributes = { scope: "col", role: "columnheader", class: isNumber ? "number" : null };
    head.append(el("th", attributes, title));
  }
  const body = el("tbody", { role: "rowgroup" });
  const made = el(
    "table",
    { role: "table" },
    el("caption", { class: "unseen" }, caption),
    el("thead", { role: "rowgroup" }, head),
    body,
  );
  return { table: made, body };
}
