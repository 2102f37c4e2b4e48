// Numbers as people read them; nothing here knows the page.

/** Whole numbers with thousands apart. */
export function count(value) {
  return value.toLocaleString("en-US");
}

/** Bytes in GiB or MiB. */
export function size(bytes) {
  const gib = bytes / 2 ** 30;
  if (gib >= 0.1) return `${gib.toFixed(gib >= 10 ? 1 : 2)} GiB`;
  return `${(bytes / 2 ** 20).toFixed(2)} MiB`;
}

/** A share from 0 to 1 in per cent; a dash for none. */
export function percent(share, digits = 1) {
  return share === null || share === undefined ? "-" : `${(100 * share).toFixed(digits)} %`;
}

/** A number of seconds in the unit that suits it; a dash for none. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`;
}

/** How long ago a Unix time was. */
export function ago(unixSeconds, now = Date.now() / 1000) {
  if (unixSeconds === null) return "never";
  const passed = Math.max(0, Math.round(now - unixSeconds));
  if (passed < 60) return `${passed} s ago`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return `${Math.floor(passed / 86400)} d ago`;
}

/** A number with three figures that count. */
export function figure(value) {
  if (!Number.isFinite(value)) return "-";
  if (value >= 100) return count(Math.round(value));
  return value.toFixed(value >= 10 ? 1 : 2);
}

/** "1 pool", "2 pools". */
export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** The sizes of layers that are not dense: "8", or "8 to 16". */
export function perLayer(counts) {
  const sizes = counts.filter((each) => each > 0);
  if (!sizes.length) return "0";
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  return least === most ? String(least) : `${least} to ${most}`;
}
