"""The pools that may be chosen, looked up anew for every choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from emo_serve.errors import RequestError
from emo_serve.names import AUTO_POOL
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.pool_admin.lookup import PoolLookup

__all__ = ["Candidates", "nothing_to_choose", "pool_size", "ranked"]


class Candidates:
    """The pools that may be chosen now."""

    def __init__(self, lookup: PoolLookup, manager: ResidencyManager) -> None:
        self._lookup, self._manager = lookup, manager

    def pools(self) -> list[ExpertPool]:
        """Return the catalog's pools that the slab can hold beside the pinned ones.

        A pool that is streamed is never chosen: it must be asked for by name.
        """
        manager = self._manager
        return [
            pool
            for pool in self._lookup.named
            if not manager.is_streamed(pool) and manager.may_ever_serve(pool)
        ]

    def base(self) -> ExpertPool | None:
        """Return the base pool if it is resident, else None."""
        base = self._lookup.base_pool
        return base if self._manager.is_resident(base) else None


def ranked(pools: Iterable[ExpertPool], votes: Mapping[str, float]) -> list[ExpertPool]:
    """Return the pools that have votes, by name: the most first, then the smallest, then by name.

    Votes are compared to nine digits.
    """
    known = (pool for pool in pools if pool.name in votes)
    return sorted(known, key=lambda pool: (-round(votes[pool.name], 9), pool_size(pool), pool.name))


def nothing_to_choose(reason: str) -> RequestError:
    """Return the error for a prompt that no pool can be chosen for."""
    return RequestError(
        f"model {AUTO_POOL!r} has no pool to choose: {reason}; name a pool of GET /v1/pools"
    )


def pool_size(pool: ExpertPool) -> int:
    """Return the number of experts in all layers: among equally good pools, fewest win."""
    return sum(map(len, pool.expert_ids))
