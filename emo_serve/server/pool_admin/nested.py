"""The smaller sizes in which an elastic pool may serve; see residency.elastic."""

from __future__ import annotations

from cachetools import LRUCache

from emo_serve.names import is_union, sized_name, split_size
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.sizes import sizes_of
from emo_serve.residency.elastic import Nested

__all__ = ["PoolSizes"]

_MAX_REMEMBERED = 1024


class PoolSizes:
    """Find the sizes that are part of a pool, which may be a size itself, by its name."""

    def __init__(self, catalog: PoolCatalog) -> None:
        self._catalog = catalog
        self._found: LRUCache[tuple[str, int, int], Nested | None] = LRUCache(_MAX_REMEMBERED)

    def of(self, pool: ExpertPool, least: int) -> Nested | None:
        """Return the pool with its sizes of at least `least` experts per layer; None without any.

        A union has none, nor has a pool without scores or with another content than its name has.
        """
        name, size = split_size(pool.name)
        definition = self._catalog.pools.get(name)
        if definition is None or is_union(pool.name):
            return None
        named = definition if size is None else self._at(name, size)
        if named.content_hash != pool.content_hash:
            return None
        key = (pool.name, self._catalog.version(name), least)
        if key not in self._found:
            self._found[key] = self._nested(named, name, least)
        return self._found[key]

    def _nested(self, pool: ExpertPool, name: str, least: int) -> Nested | None:
        known = sizes_of(self._catalog.pools[name], self._catalog.moe_layers)
        if known is None:
            return None
        smaller = range(max(least, known.start), max(map(len, pool.expert_ids)))
        if not smaller:
            return None
        largest = Nested(pool, smaller, lambda k: self._at(name, k)).largest(
            lambda size: _is_part(size, pool)  # a file may list others than its best experts
        )
        if largest is None:
            return None
        return Nested(pool, range(smaller.start, largest + 1), lambda k: self._at(name, k))

    def _at(self, name: str, k: int) -> ExpertPool:
        return self._catalog.resolve(sized_name(name, k))


def _is_part(size: ExpertPool, pool: ExpertPool) -> bool:
    pairs = zip(size.expert_ids, pool.expert_ids, strict=True)
    return all(set(some) <= set(every) for some, every in pairs)
