"""A pool at other sizes: the K best experts per layer, by the scores that its file keeps.

So one pool with scores is a family, nested in each other: `math@4` is part of `math@8`. A pool at a
size is a pool like any other; only its name and its experts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emo_serve.facts import MoeLayer
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.pools.strict_json import refusal

__all__ = ["at_size", "served_pool", "sizes_of"]


def sizes_of(pool: ExpertPool, moe_layers: Sequence[MoeLayer | None] | None = None) -> range | None:
    """Return the numbers of experts per layer that the pool can be cut to; None without scores.

    The smallest is what every pool has, the largest all experts of the largest layer. Raises
    PoolFileError where neither `moe_layers` nor the pool tells the implied experts.
    """
    counts = [len(layer.scores or ()) for layer in pool.layers if layer is not None]
    if not (counts and pool.has_scores):
        return None
    return range(max(1, *map(len, pool.implied(moe_layers))), max(counts) + 1)


def at_size(
    pool: ExpertPool, k: int, moe_layers: Sequence[MoeLayer | None] | None = None
) -> ExpertPool:
    """Return the pool `NAME@k` of the `k` best experts per layer; `k` is one of `sizes_of`.

    It has the experts that `cut` keeps, and no scores: they stay with the pool.
    """
    cut = pool.cut(k, moe_layers)
    layers = (None if layer is None else LayerExperts(layer.experts) for layer in cut.layers)
    return replace(cut, name=pool.name_at(k), layers=tuple(layers))


def served_pool(
    pool: ExpertPool,
    moe_layers: Sequence[MoeLayer | None],
    source: str,
    default_experts: int | None = None,
) -> ExpertPool:
    """Return what a pool's bare name stands for: the pool, completed and at its default size.

    That is its own `default_experts`, else the one given, which pools without scores ignore. The
    pool must fit the model. Raises PoolFileError, naming `source`, for a default that is not one of
    its sizes.
    """
    complete = pool.complete(moe_layers)
    sizes = sizes_of(complete, moe_layers)
    k = pool.default_experts or default_experts
    if k is None or sizes is None:
        return complete
    if k not in sizes:
        expected = f"{sizes[0]} to {sizes[-1]}, the sizes that the model allows"
        raise refusal(source, "default_experts", k, expected)
    return complete.cut(k, moe_layers)
