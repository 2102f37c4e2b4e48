"""Sizes per layer by score mass instead of uniformly: more experts where a layer spreads its load.

A layer's scores say what share of its routing each expert had on the calibration texts. With `k`
experts per layer on average, those with the highest scores of ALL layers are kept, so that the
score mass in the pool is as large as it can be; a layer that needs few experts leaves room to one
that needs many.
"""

from __future__ import annotations

from dataclasses import replace

from emo_serve.pools.pool import ExpertPool, LayerExperts

__all__ = ["share_out"]


def share_out(pool: ExpertPool, k: int) -> ExpertPool:
    """Return the pool of `k` experts per layer on average that holds the most score mass.

    Each layer keeps its implied experts and at least one; ties go to the earlier layer and lower
    id. The pool must have scores and name its implied experts.
    """
    implied = pool.implied(None)
    kept: list[set[int]] = []
    rest: list[tuple[float, int, int]] = []
    for index, layer in enumerate(pool.layers):
        scores = layer.scores or () if layer else ()
        always = set(implied[index])
        if scores and not always:
            always = {max(range(len(scores)), key=lambda expert: scores[expert])}
        kept.append(always)
        total = sum(scores) or 1.0
        rest += [(-s / total, index, e) for e, s in enumerate(scores) if e not in always]
    room = k * sum(layer is not None for layer in pool.layers) - sum(map(len, kept))
    for _, index, expert in sorted(rest)[: max(0, room)]:
        kept[index].add(expert)
    layers = (
        None if layer is None else LayerExperts(tuple(chosen))
        for layer, chosen in zip(pool.layers, kept, strict=True)
    )
    name = f"{pool.name}-by-mass-{k}"
    return replace(pool, name=name, layers=tuple(layers), calibration=None, default_experts=None)
