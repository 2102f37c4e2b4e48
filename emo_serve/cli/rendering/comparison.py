"""A comparison of pools as text: similarity, what pools share per layer, slots and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from emo_serve.cli.rendering.tables import columns, size_range
from emo_serve.pools.comparison import Pair, PoolComparison, SubsetNeed

__all__ = ["describe_comparison", "layer_table", "similarity_table", "slab_bytes", "slot_table"]

_MOST_COLUMNS = 16
_MOST_NAMES = 6


def describe_comparison(
    comparison: PoolComparison,
    experts_per_layer: Sequence[int] | None = None,
    expert_bytes: int | None = None,
) -> str:
    """Lay out everything; given the experts and bytes of the model, also the memory needed.

    `experts_per_layer` counts MoE layers only.
    """
    parts = [_summary(comparison, experts_per_layer)]
    if len(comparison.names) > 1:
        parts += [similarity_table(comparison), _extremes(comparison.pairs)]
    parts.append(layer_table(comparison, experts_per_layer))
    parts.append(slot_table(comparison, experts_per_layer, expert_bytes))
    return "\n\n".join(parts)


def similarity_table(comparison: PoolComparison) -> str:
    """Lay out the matrix of similarities; too wide a one is left to --png."""
    title = "similarity (experts in both / experts in either, mean over the MoE layers)"
    if len(comparison.names) > _MOST_COLUMNS:
        return f"{title}: {len(comparison.names)} pools are too many for a table; see --png"
    rows = [["", *comparison.names]]
    for index, (name, row) in enumerate(zip(comparison.names, comparison.similarity, strict=True)):
        rows.append([name, *(f"{value:.2f}" for value in row[:index]), "-"])
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
    return f"{title}\n{columns(rows)}"


def layer_table(comparison: PoolComparison, experts_per_layer: Sequence[int] | None = None) -> str:
    """Lay out what the pools share, one row per MoE layer."""
    header = ["LAYER", "IN ANY POOL", "IN EVERY POOL", "SIMILARITY", "LOWEST", "HIGHEST"]
    if experts_per_layer is not None:
        header.insert(1, "EXPERTS")
    rows = [header]
    for index, layer in enumerate(comparison.layers):
        values = [pair.per_layer[index] for pair in comparison.pairs]
        row = [str(layer), str(comparison.unions[index]), str(comparison.in_every_pool[index])]
        row += [f"{f(values):.2f}" if values else "-" for f in (mean, min, max)]
        if experts_per_layer is not None:
            row.insert(1, str(experts_per_layer[index]))
        rows.append(row)
    return columns(rows)


def slot_table(
    comparison: PoolComparison,
    experts_per_layer: Sequence[int] | None = None,
    expert_bytes: int | None = None,
) -> str:
    """Lay out the slots per layer, as in --expert-slots, that 1, 2, ... pools need together."""
    has_bytes = experts_per_layer is not None and expert_bytes is not None
    header = ["POOLS", "ANY", *(["MIB"] * has_bytes), "BEST", *(["MIB"] * has_bytes), "THE BEST"]
    rows = [header]
    needs = comparison.subset_needs()
    for need in needs:
        row = [str(need.count)]
        for slots in (need.most, need.fewest):
            row.append(f"{'' if need.is_exact else '<='}{slots}")
            if experts_per_layer is not None and expert_bytes is not None:
                row.append(f"{slab_bytes(slots, experts_per_layer, expert_bytes) / 2**20:.1f}")
        rows.append([*row, _names(need, comparison.names)])
    title = "slots per layer that this many pools need together: any of them, or the best choice"
    lines = [title, columns(rows)]
    if not all(need.is_exact for need in needs):
        lines.append("<= an upper bound; there are too many choices to try them all")
    lines.append(_advice(comparison, experts_per_layer, expert_bytes))
    return "\n".join(lines)


def slab_bytes(slots: int, experts_per_layer: Sequence[int], expert_bytes: int) -> int:
    """Return the bytes of that many slots per layer; a layer has at most one per expert."""
    return sum(min(slots, experts) for experts in experts_per_layer) * expert_bytes


def _summary(comparison: PoolComparison, experts_per_layer: Sequence[int] | None) -> str:
    sizes = size_range([size for sizes in comparison.sizes for size in sizes])
    of_them = f" of {size_range(experts_per_layer)}" if experts_per_layer else ""
    pools = "1 pool" if len(comparison.names) == 1 else f"{len(comparison.names)} pools"
    return f"{pools}, {len(comparison.layers)} MoE layers, {sizes}{of_them} experts per layer"


def _extremes(pairs: Sequence[Pair]) -> str:
    lines = [f"mean of all pairs {mean(pair.similarity for pair in pairs):.2f}"]
    for how, choose in (("most", max), ("least", min)):
        pair = choose(pairs, key=lambda pair: pair.similarity)
        low, high = min(pair.per_layer), max(pair.per_layer)
        lines.append(
            f"{how} similar: {pair.first} and {pair.second}, {pair.similarity:.2f}"
            f" (layers {low:.2f} to {high:.2f})"
        )
    return "\n".join(lines)


def _names(need: SubsetNeed, names: Sequence[str]) -> str:
    others = [name for name in names if name not in need.names]
    if not others:
        return "all"
    if len(others) < len(need.names):
        return "all but " + _shortened(others)
    return _shortened(need.names)


def _shortened(names: Sequence[str]) -> str:
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return ", ".join(names[:_MOST_NAMES]) + f" and {len(names) - _MOST_NAMES} more"


def _advice(
    comparison: PoolComparison,
    experts_per_layer: Sequence[int] | None,
    expert_bytes: int | None,
) -> str:
    slots = comparison.slots
    advice = f"all together: --expert-slots {slots}"
    if experts_per_layer is None or expert_bytes is None:
        return advice + " (give --model to see the bytes)"
    needed = slab_bytes(slots, experts_per_layer, expert_bytes)
    full = slab_bytes(max(experts_per_layer), experts_per_layer, expert_bytes)
    return (
        f"{advice}, or --expert-memory {needed} (bytes, {needed / 2**20:.1f} MiB, in the"
        f" checkpoint's dtype on one device; the whole model's experts: {full / 2**20:.1f} MiB)"
    )
