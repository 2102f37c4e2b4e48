"""The residency manager, asked by name: what a request or an operator wants of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.server.pool_admin.lookup import PoolLookup

__all__ = ["NamedResidency"]


class NamedResidency:
    """Admit requests, and load, evict and pin pools; raises as lookup and manager do."""

    def __init__(self, lookup: PoolLookup, manager: ResidencyManager) -> None:
        self._lookup, self._manager = lookup, manager

    # -- requests --

    def admit(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Return the pool a request asks for; raises unless the request may wait for it now."""
        return self._admitted(self._lookup.find(model, headers))

    def lease(self, pool: ExpertPool) -> AbstractAsyncContextManager[Lease]:
        """Hold a pool for one engine request."""
        return self._manager.lease(pool)

    # -- operators --

    async def load(self, name: str, *, pin: bool = False) -> ExpertPool:
        """Make a pool or union resident, in the queue that requests wait in."""
        pool = self._admitted(self._lookup.find(name))
        await self._manager.load(pool, pin=pin)
        return pool

    async def evict(self, name: str, *, drain: bool = False) -> ExpertPool:
        """Take a pool's slots away as far as no other pool needs them; raises PoolInUse."""
        pool = self._lookup.find(name)
        await self._manager.evict(pool, drain=drain)
        return pool

    def unpin(self, name: str) -> ExpertPool:
        """Let a pool be evicted like any other."""
        pool = self._lookup.find(name)
        self._manager.unpin(pool)
        return pool

    def _admitted(self, pool: ExpertPool) -> ExpertPool:
        """Return a pool that its name has just led to; raises unless it may be waited for.

        The pool is defined, so it may stay, even if its content was retired under an earlier
        definition. A union that was not in use when its parts were defined again is revived here.
        """
        self._manager.revive(pool)
        self._manager.check_admissible(pool)
        return pool
