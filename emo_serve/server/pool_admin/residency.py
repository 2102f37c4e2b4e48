"""The residency manager by pool name, for requests and operators."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.backlog import BacklogLimits, Place
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.pool_admin.nested import PoolSizes
from emo_serve.server.pool_admin.status import PoolStatus, PoolStatuses
from emo_serve.server.pool_admin.temperatures import RouterTemperatures

__all__ = ["NamedResidency"]


class NamedResidency:
    """Admit requests, and load, evict and pin pools by name.

    The manager pins contents; here is which names the operator has pinned. `min_experts` is how
    small a part of its pool may serve a request that does not say; without it, none. Raises the
    errors of PoolLookup.find and of the manager's methods.
    """

    def __init__(
        self,
        lookup: PoolLookup,
        manager: ResidencyManager,
        statuses: PoolStatuses,
        sizes: PoolSizes,
        temperatures: RouterTemperatures,
        min_experts: int | None = None,
    ) -> None:
        self._lookup, self._manager, self._statuses = lookup, manager, statuses
        self._sizes, self._min_experts = sizes, min_experts
        self._temperatures = temperatures
        self._pinned_names: set[str] = set()

    # -- requests --

    def admit(
        self,
        model: str | None,
        headers: Sequence[str] = (),
        *,
        least: int | None = None,
        begun: MutableMapping[str, str] | None = None,
        temperature: float | None = None,
    ) -> ExpertPool:
        """Return the pool that serves a request; raises if the request may not wait for it.

        That is the pool asked for or, as far as `least` allows (0: never, None: as the operator
        says), a smaller size of it. `begun` has, by the name asked for, what serves the earlier
        engine requests of this client's request, and so this one. At a router `temperature` of the
        client's it is a pool of its own, with the same name, which is served whole.
        """
        begun = {} if begun is None else begun
        asked = self._lookup.find(model, headers)
        if temperature is not None:
            return self._admitted(self._temperatures.pool_at(asked, temperature))
        if asked.name in begun:
            return self._admitted(self._lookup.find(begun[asked.name]))
        self._manager.revive(asked)
        least = self._min_experts if least is None else least
        nested = self._sizes.of(asked, least) if least else None
        served = self._admitted(asked if nested is None else self._manager.begin(nested))
        begun[asked.name] = served.name
        return served

    @property
    def limits(self) -> BacklogLimits | None:
        """Return the bound on admitted sequences; None if there is none."""
        return self._manager.limits

    def enter(self, pool: ExpertPool, num_sequences: int, *, is_continued: bool = False) -> Place:
        """Count a request just admitted until its place is released; raises TooManyQueued."""
        return self._manager.enter(pool, num_sequences, is_continued=is_continued)

    def lease(self, pool: ExpertPool) -> AbstractAsyncContextManager[Lease]:
        """Hold a pool resident for one engine request; waits for it if it must be loaded."""
        return self._manager.lease(pool)

    # -- operators --

    async def load(self, name: str, *, pin: bool = False) -> PoolStatus:
        """Make a pool, size or union resident; waits in the same queue as requests."""
        pool = self._admitted(self._lookup.find(name))
        await self._manager.load(pool, pin=pin)
        if pin:
            self._pinned_names.add(pool.name)
        return self._statuses.of(pool)

    async def evict(self, name: str, *, drain: bool = False) -> PoolStatus:
        """Free the slots that no other pool needs, at all router temperatures; raises PoolInUse."""
        pool = self._lookup.find(name)
        held = (one for one in self._manager.pools if one.name == pool.name)
        await self._manager.evict(pool, *held, drain=drain)
        return self._statuses.of(pool)

    async def evict_all(self, *, drain: bool = False) -> None:
        """Free all slots that no pinned pool needs; raises PoolInUse before any pool is evicted."""
        unpinned = (pool for pool in self._manager.pools if not self._manager.is_pinned(pool))
        await self._manager.evict(*unpinned, drain=drain)

    def unpin(self, name: str) -> PoolStatus:
        """Allow a pinned pool to be evicted again, and so every other name of its content."""
        pool = self._lookup.find(name)
        self._manager.unpin(pool)
        self._pinned_names -= self._names_of(pool.content_hash)
        return self._statuses.of(pool)

    @property
    def pinned_names(self) -> frozenset[str]:
        """Return the names that the operator has pinned."""
        return frozenset(self._pinned_names)

    def is_pinned(self, name: str) -> bool:
        """Tell whether the operator has pinned this name, and not only an equal content."""
        return name in self._pinned_names

    def drop_pins(self, replaced: Sequence[ExpertPool]) -> list[str]:
        """Unpin definitions that are replaced, and return the names that were pinned.

        A content stays pinned if another name has pinned it. Called when the catalog has changed
        already.
        """
        pinned = [pool.name for pool in replaced if self.is_pinned(pool.name)]
        self._pinned_names.difference_update(pinned)
        for pool in replaced:
            if not self._names_of(pool.content_hash):
                self._manager.unpin(pool)
        return pinned

    def _names_of(self, content_hash: str) -> set[str]:
        """Return the pinned names whose content this is."""
        known = {name: self._lookup.known(name) for name in self._pinned_names}
        return {name for name, pool in known.items() if pool and pool.content_hash == content_hash}

    def _admitted(self, pool: ExpertPool) -> ExpertPool:
        """Return a pool just found by name; raises if requests may not wait for it.

        The pool is defined, so it may stay, even if an equal content was retired with an earlier
        definition. This also revives a union that was not in use when its parts were redefined.
        """
        self._manager.revive(pool)
        self._manager.check_admissible(pool)
        return pool
