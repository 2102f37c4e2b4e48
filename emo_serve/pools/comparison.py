"""How similar pools are, and how many slots they need together.

Slots are counted per layer: every layer has the same number of them (or one per expert, if it has
fewer experts), and pools share the experts they have in common. A set of pools can be resident
together if no layer's union is larger than the slots per layer, so it needs the largest union of
any layer. `residency.slots` does the same accounting at run time.

For each number of pools there are two answers: what the best choice of that many pools needs, and
what any choice needs at most. Both are exact while there are few enough choices to try them all;
beyond that both are upper bounds, that is, enough slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import mean

from emo_serve.errors import PoolFileError
from emo_serve.pools.pool import ExpertPool

__all__ = ["Pair", "PoolComparison", "SubsetNeed", "jaccard"]

_MOST_SUBSETS = 20_000  # of one size; 16 pools have fewer of any size


@dataclass(frozen=True)
class Pair:
    """Two pools; `per_layer` is the Jaccard index of their experts in each MoE layer."""

    first: str
    second: str
    per_layer: tuple[float, ...]

    @property
    def similarity(self) -> float:
        """Return the mean over the layers."""
        return mean(self.per_layer)


@dataclass(frozen=True)
class SubsetNeed:
    """Slots per layer for `count` pools: `fewest` hold `names`, the best choice; `most` hold any.

    Both are exact if `is_exact`, otherwise upper bounds.
    """

    count: int
    fewest: int
    names: tuple[str, ...]
    most: int
    is_exact: bool


def jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    """Return |both| / |either|; 1 for two empty sets."""
    either = len(first | second)
    return len(first & second) / either if either else 1.0


class PoolComparison:
    """Compare pools of one model, in the order given.

    Only experts listed in a pool count, so complete pools first. Raises PoolFileError for pools of
    models with different layers.
    """

    def __init__(self, pools: Sequence[ExpertPool]) -> None:
        assert pools, "at least one pool"
        shapes = [[layer is None for layer in pool.layers] for pool in pools]
        for pool, shape in zip(pools, shapes, strict=True):
            if shape != shapes[0]:
                raise PoolFileError(
                    f"pools {pools[0].name!r} and {pool.name!r} are for models with different"
                    " layers and cannot be compared; give --model to leave out other models' pools"
                )
        self.names = tuple(pool.name for pool in pools)
        self.layers = tuple(index for index, is_dense in enumerate(shapes[0]) if not is_dense)
        if not self.layers:
            raise PoolFileError(f"pool {pools[0].name!r} has no MoE layer to compare")
        self._sets = [
            [frozenset(pool.expert_ids[layer]) for layer in self.layers] for pool in pools
        ]
        widths = [
            max(max(s[i], default=0) for s in self._sets) + 1 for i in range(len(self.layers))
        ]
        self._shares: list[tuple[int, int]] = []  # each layer's first bit and mask
        first_bit = 0
        for width in widths:
            self._shares.append((first_bit, (1 << width) - 1))
            first_bit += width
        self._bits = [
            sum(
                1 << first + expert
                for (first, _), experts in zip(self._shares, sets, strict=True)
                for expert in experts
            )
            for sets in self._sets
        ]

    # -- similarity --

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Return all pairs of pools."""
        return tuple(
            Pair(self.names[i], self.names[j], tuple(map(jaccard, self._sets[i], self._sets[j])))
            for i, j in combinations(range(len(self.names)), 2)
        )

    @cached_property
    def similarity(self) -> tuple[tuple[float, ...], ...]:
        """Return the matrix of mean similarities, pools by pools in the order of `names`."""
        size = len(self.names)
        rows = [[1.0] * size for _ in range(size)]
        for (i, j), pair in zip(combinations(range(size), 2), self.pairs, strict=True):
            rows[i][j] = rows[j][i] = pair.similarity
        return tuple(map(tuple, rows))

    @cached_property
    def overlap(self) -> tuple[tuple[float, ...], ...]:
        """Return, as MoE layers x pools, the share of a pool that another pool has, on average.

        It is the part of a load that is saved when one other pool, chosen at random, is resident.
        """
        return tuple(
            tuple(self._mean_share(layer, index) for index in range(len(self.names)))
            for layer in range(len(self.layers))
        )

    def _mean_share(self, layer: int, index: int) -> float:
        mine = self._sets[index][layer]
        others = [sets[layer] for other, sets in enumerate(self._sets) if other != index]
        if not others:
            return 0.0
        return mean(len(mine & theirs) / len(mine) if mine else 1.0 for theirs in others)

    # -- sharing --

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Return how many experts each pool has in each MoE layer."""
        return tuple(tuple(map(len, sets)) for sets in self._sets)

    @cached_property
    def unions(self) -> tuple[int, ...]:
        """Return how many experts of each MoE layer are in any pool."""
        return tuple(len(frozenset().union(*experts)) for experts in zip(*self._sets, strict=True))

    @cached_property
    def in_every_pool(self) -> tuple[int, ...]:
        """Return how many experts of each MoE layer are in every pool."""
        return tuple(
            len(frozenset.intersection(*experts)) for experts in zip(*self._sets, strict=True)
        )

    # -- slots --

    @property
    def slots(self) -> int:
        """Return the slots per layer that all pools need together."""
        return max(self.unions)

    def subset_needs(self, most_subsets: int = _MOST_SUBSETS) -> tuple[SubsetNeed, ...]:
        """Return what 1, 2, ... all pools need; exact for at most `most_subsets` subsets a size."""
        greedy = self._greedy_choices()
        needs: list[SubsetNeed] = []
        for count in range(len(self.names), 0, -1):
            if math.comb(len(self.names), count) <= most_subsets:
                needs.append(self._exact_need(count))
            else:
                needs.append(self._bounded_need(count, greedy[:count], needs[-1]))
        return tuple(reversed(needs))

    def _exact_need(self, count: int) -> SubsetNeed:
        fewest = most = None
        for chosen, union in self._subsets(count, 0, 0, ()):
            slots = self._slots_of(union)
            if fewest is None or slots < fewest[0]:
                fewest = slots, chosen
            most = slots if most is None else max(most, slots)
        assert fewest is not None and most is not None, "there is a subset of each size"
        return SubsetNeed(count, fewest[0], self._names_of(fewest[1]), most, is_exact=True)

    def _subsets(
        self, count: int, start: int, union: int, chosen: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], int]]:
        if not count:
            yield chosen, union
            return
        for index in range(start, len(self.names) - count + 1):
            yield from self._subsets(
                count - 1, index + 1, union | self._bits[index], (*chosen, index)
            )

    def _bounded_need(self, count: int, greedy: Sequence[int], larger: SubsetNeed) -> SubsetNeed:
        """Bound by a greedy choice, by the sum of the largest pools, and by the next larger set.

        Exact needs grow with the number of pools, and so do these bounds.
        """
        union = 0
        for index in greedy:
            union |= self._bits[index]
        fewest, names = self._slots_of(union), self._names_of(greedy)
        if larger.fewest < fewest:
            fewest, names = larger.fewest, larger.names[:count]
        disjoint = max(
            sum(sorted(len(sets[layer]) for sets in self._sets)[-count:])
            for layer in range(len(self.layers))
        )
        return SubsetNeed(count, fewest, names, min(disjoint, larger.most), is_exact=False)

    def _greedy_choices(self) -> list[int]:
        """Order the pools so that each adds as few experts as possible to those before it."""
        left = list(range(len(self.names)))
        chosen: list[int] = []
        union = 0
        while left:
            costs = {i: union | self._bits[i] for i in left}
            best = min(left, key=lambda i: (self._slots_of(costs[i]), costs[i].bit_count(), i))
            union = costs[best]
            left.remove(best)
            chosen.append(best)
        return chosen

    def _slots_of(self, union: int) -> int:
        return max((union >> first & mask).bit_count() for first, mask in self._shares)

    def _names_of(self, chosen: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.names[index] for index in sorted(chosen))
