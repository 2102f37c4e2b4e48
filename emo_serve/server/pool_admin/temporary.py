"""Temporary pools that clients cannot name: the server's own, for builds and for router probes.

Such a pool is held for a while and then retired, unless a defined or pinned pool has the same
content. While it is held, a redefinition of another pool does not retire it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.pool_admin.lookup import PoolLookup

__all__ = ["TemporaryPools"]


class TemporaryPools:
    """Hold temporary pools; pools of equal content count as one pool, held several times."""

    def __init__(self, lookup: PoolLookup, manager: ResidencyManager) -> None:
        self._lookup, self._manager = lookup, manager
        self._held: Counter[str] = Counter()  # content hashes

    @property
    def content_hashes(self) -> frozenset[str]:
        """Return the content hashes of the pools that are held."""
        return frozenset(self._held)

    def hold(self, pool: ExpertPool) -> None:
        """Let a pool be leased and loaded from now on, for as long as the server runs."""
        self._held[pool.content_hash] += 1
        self._manager.revive(pool)

    @contextmanager
    def held(self, pool: ExpertPool) -> Iterator[None]:
        """Allow a pool to be leased and loaded inside the block."""
        self.hold(pool)
        try:
            yield
        finally:
            self._held[pool.content_hash] -= 1
            self._held += Counter()  # drops what is 0
            if not self._is_wanted(pool):
                self._manager.retire(pool)

    @contextmanager
    def path(self) -> Iterator[Callable[[ExpertPool], Awaitable[None]]]:
        """Yield a function that makes one pool after another resident; afterwards none is held.

        Each pool replaces the one before. The old pool stays until the new one is loaded, so that
        experts in both are not copied again, but it is the first to be evicted for room.
        """
        kept = ExitStack()
        current: ExpertPool | None = None

        async def become(pool: ExpertPool) -> None:
            nonlocal kept, current
            with ExitStack() as new:
                new.enter_context(self.held(pool))
                if current is not None:
                    self._manager.cool(current)
                await self._manager.load(pool)
                kept.close()
                kept, current = new.pop_all(), pool

        try:
            yield become
        finally:  # cancelled requests may keep it for another moment
            kept.close()

    def _is_wanted(self, pool: ExpertPool) -> bool:
        is_defined = pool.content_hash in {known.content_hash for known in self._lookup.pools}
        is_pinned = self._manager.is_pinned(pool)  # a union with the same content may be pinned
        return pool.content_hash in self._held or is_defined or is_pinned
