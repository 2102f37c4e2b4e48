// Prometheus text, and rates between two readings of it; nothing here knows the page.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** Return samples by metric: `{name: [{labels, value}]}`. */
export function parseMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (match === null) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    (found[match[1]] ??= []).push({ labels, value: Number(match[3]) });
  }
  return found;
}

/** Add up a metric's samples, those whose labels are these. */
export function total(samples, name, labels = {}) {
  const wanted = Object.entries(labels);
  let sum = 0;
  for (const sample of samples[name] ?? []) {
    if (wanted.every(([label, value]) => sample.labels[label] === value)) sum += sample.value;
  }
  return sum;
}

/** Return the values of a label that a metric has. */
export function labelValues(samples, name, label) {
  return [...new Set((samples[name] ?? []).map((sample) => sample.labels[label]))];
}

/** How much a counter grew; from zero, if the server was started anew meanwhile. */
export function growth(before, after, name, labels = {}) {
  const [first, last] = [total(before, name, labels), total(after, name, labels)];
  return last < first ? last : last - first;
}
