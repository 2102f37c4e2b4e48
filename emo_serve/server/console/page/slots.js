// What is in each slot, from the two events of the stream; no drawing.

/** The kinds of slots, with the words of the legend. */
export const KINDS = [
  ["one", "one pool needs it"],
  ["shared", "several pools need it"],
  ["leased", "leased: a running request uses it"],
  ["loading", "being loaded"],
  ["free", "free"],
];

/**
 * Return `[{layer, slots}]` of the layers that have slots; a slot is
 * `{slot, expert, kind, isLeased, pools}`, where `kind` is one of "free", "loading", "one" and
 * "shared".
 */
export function readSlots(slots, pools) {
  const running = new Set();
  for (const card of pools?.data ?? []) {
    if (card.running_requests) running.add(card.content_hash);
  }
  const layers = [];
  slots.layers.forEach((layer, index) => {
    if (layer === null) return;
    const loading = new Set(layer.loading);
    const read = layer.experts.map((expert, slot) => {
      const holders = layer.holders[slot].map((place) => slots.pools[place]);
      return {
        slot,
        expert,
        kind: kindOf(expert, holders, loading.has(slot)),
        isLeased: holders.some((holder) => running.has(holder.content_hash)),
        pools: holders,
      };
    });
    layers.push({ layer: index, slots: read });
  });
  return layers;
}

function kindOf(expert, holders, isLoading) {
  if (expert === null) return "free";
  if (isLoading) return "loading";
  return holders.length > 1 ? "shared" : "one";
}

/** Count the slots by kind; "leased" counts slots that are also "one" or "shared". */
export function countSlots(layers) {
  const counts = { one: 0, shared: 0, leased: 0, loading: 0, free: 0, total: 0 };
  for (const { slots } of layers) {
    for (const slot of slots) {
      counts[slot.kind] += 1;
      counts.leased += slot.isLeased;
      counts.total += 1;
    }
  }
  return counts;
}

/** One slot in words. */
export function describe(layer, slot) {
  const place = `Layer ${layer}, slot ${slot.slot}`;
  if (slot.kind === "free") return `${place}: free`;
  const names = slot.pools.map((pool) => pool.name).join(", ");
  const verb = slot.kind === "loading" ? "being loaded for" : "needed by";
  return `${place}: expert ${slot.expert}, ${verb} ${names}${slot.isLeased ? "; leased" : ""}`;
}
