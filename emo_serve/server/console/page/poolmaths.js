// What pools have in common; experts are lists of ids per layer, empty for a dense layer.

/** The experts both have, of those either has: mean over the layers that have experts. */
export function overlap(mine, theirs) {
  const shares = [];
  mine.forEach((ids, layer) => {
    const both = new Set([...ids, ...theirs[layer]]);
    if (both.size) shares.push((ids.length + theirs[layer].length - both.size) / both.size);
  });
  return shares.length ? shares.reduce((sum, each) => sum + each, 0) / shares.length : 1;
}

/** What two pools need together: `{perLayer, total}`. */
export function together(mine, theirs) {
  const perLayer = mine.map((ids, layer) => new Set([...ids, ...theirs[layer]]).size);
  return { perLayer, total: perLayer.reduce((sum, each) => sum + each, 0) };
}
