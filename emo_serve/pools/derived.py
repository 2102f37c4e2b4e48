"""Pools made of other pools by name: `math@8`, a size, and `math@8+code`, a union.

Nothing defines them; they exist as long as the pools that they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from cachetools import LRUCache

from emo_serve.errors import UnknownPool
from emo_serve.facts import MoeLayer
from emo_serve.names import (
    SIZE,
    canonical_name,
    pools_of,
    split_name,
    split_size,
)
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.sizes import at_size, sizes_of
from emo_serve.spelling import did_you_mean

__all__ = ["DerivedPools", "derive", "unknown_definition"]

_Pools = Mapping[str, ExpertPool]

# Clients choose which unions and sizes exist, so the number remembered is bounded.
_MAX_REMEMBERED = 1024


class DerivedPools:
    """Find pools by any name, and remember those that had to be made.

    Tell it what has changed (`forget`); equal names then give one object.
    """

    def __init__(self, moe_layers: Sequence[MoeLayer | None] | None) -> None:
        self._moe_layers = moe_layers
        self._made: LRUCache[str, ExpertPool] = LRUCache(_MAX_REMEMBERED)

    def resolve(self, name: str, pools: _Pools) -> ExpertPool:
        """Return the pool of that name among `pools`, or made of them; raises as `derive`."""
        canonical = canonical_name(name)
        if canonical in pools:
            return pools[canonical]
        if canonical not in self._made:
            self._made[canonical] = derive(canonical, pools, self._moe_layers)
        return self._made[canonical]

    def forget(self, pool: str) -> None:
        """Forget what was made of a pool, which has another definition now, or none."""
        for name in [name for name in self._made if pool in pools_of(name)]:
            del self._made[name]


def derive(
    canonical: str, pools: _Pools, moe_layers: Sequence[MoeLayer | None] | None
) -> ExpertPool:
    """Return the pool of a canonical name, made of `pools`.

    Raises UnknownPool, which names the pools or the sizes there are, and RequestError for pools
    that cannot be united.
    """
    parts = [_part(part, pools, moe_layers) for part in split_name(canonical)]
    return reduce(ExpertPool.union, parts)


def unknown_definition(name: str, pools: _Pools) -> UnknownPool:
    """Return the error for a name that no pool is defined by, though a size may have it."""
    pool, size = split_size(name)
    if size is not None and pool in pools:
        return UnknownPool(
            f"{name!r} has no definition of its own: it is a size of pool {pool!r}; name {pool!r}"
        )
    return _no_such_pool(name, pools)


def _part(part: str, pools: _Pools, moe_layers: Sequence[MoeLayer | None] | None) -> ExpertPool:
    if part in pools:
        return pools[part]
    name, size = split_size(part)
    sizes = sizes_of(pools[name], moe_layers) if name in pools else None
    if size is None or sizes is None or size not in sizes:
        raise _no_such_size(part, pools, moe_layers)
    return at_size(pools[name], size, moe_layers)


def _no_such_pool(part: str, pools: _Pools) -> UnknownPool:
    there_are = ", ".join(pools) or "none"
    meant = did_you_mean(split_size(part)[0], pools)
    return UnknownPool(f"there is no pool {part[:80]!r}{meant}; the pools are: {there_are}")


def _no_such_size(
    part: str, pools: _Pools, moe_layers: Sequence[MoeLayer | None] | None
) -> UnknownPool:
    """Return the error for a pool that exists at other sizes, or not at all."""
    name, sign, _ = part.rpartition(SIZE)
    if not sign or name not in pools:
        return _no_such_pool(part, pools)
    no_pool = f"there is no pool {part[:80]!r}"
    if (sizes := sizes_of(pools[name], moe_layers)) is not None:
        first, last = (pools[name].name_at(k) for k in (sizes[0], sizes[-1]))
        return UnknownPool(
            f"{no_pool}: the sizes of pool {name!r} are {sizes[0]} to {sizes[-1]} experts per"
            f" layer, from {first!r} to {last!r}"
        )
    others = ", ".join(other for other, pool in pools.items() if pool.has_scores) or "none"
    return UnknownPool(
        f"{no_pool}: pool {name!r} has no scores by which to choose its best experts, and so has"
        f" one size; the pools with sizes are: {others}"
    )
