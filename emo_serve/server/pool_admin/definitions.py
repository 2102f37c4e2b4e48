"""Changes to pool definitions while the server runs: add, redefine, remove.

Definitions change one at a time, and the pool's file changes first. A request keeps the definition
it was admitted with: the old experts stay, under their own content hash, until the last such
request has ended, so no answer mixes two definitions. Pins belong to names: after a redefinition,
the new content of a pinned pool, and of pinned sizes and unions of it, is loaded and pinned.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import TypeVar

from emo_serve.errors import (
    ConfigError,
    EmoServeError,
    EngineDead,
    PoolFileError,
    PoolLoadFailed,
    RequestError,
    StateConflict,
    Unavailable,
    UnknownPool,
)
from emo_serve.facts import MoeLayer
from emo_serve.metrics import PoolMetrics
from emo_serve.names import BASE_POOL, pools_of
from emo_serve.pools.catalog import CatalogChange, PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.pool_admin.cuts import Cut, CutRequest, cut_pool, cuts_of
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.pool_admin.residency import NamedResidency
from emo_serve.server.pool_admin.status import PoolStatus, PoolStatuses
from emo_serve.server.pool_admin.temporary import TemporaryPools

__all__ = ["PoolDefinitions"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class PoolDefinitions:
    """Change the catalog of a running server, and adapt residency to the change."""

    def __init__(
        self,
        lookup: PoolLookup,
        catalog: PoolCatalog,
        manager: ResidencyManager,
        residency: NamedResidency,
        temporary: TemporaryPools,
        statuses: PoolStatuses,
        metrics: PoolMetrics | None,
    ) -> None:
        self._lookup, self._catalog, self._manager = lookup, catalog, manager
        self._residency = residency
        self._temporary, self._statuses, self._metrics = temporary, statuses, metrics
        self._on_removed: Callable[[str], None] = lambda name: None
        self._one_change = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()  # asyncio keeps weak references

    def when_removed(self, on_removed: Callable[[str], None]) -> None:
        """Call this, on a thread, with the name of each pool that is removed."""
        self._on_removed = on_removed

    async def add(
        self, pool: ExpertPool, *, replace: bool = False, writes: bool = True
    ) -> tuple[PoolStatus, bool]:
        """Define a pool, or with `replace` redefine it; return it and whether it is new.

        Without `writes`, another server writes the file, in a directory that both read.

        Raises RequestError for a pool that does not fit the model, PoolExists, StateConflict and
        PoolStoreError, all before anything has changed. If a redefined pool was pinned and its new
        content cannot be loaded, raises PoolLoadFailed or Unavailable: the pool is then redefined
        but no longer pinned.
        """
        return await self.to_the_end(self._add(pool, replace, writes))

    async def remove(self, name: str, *, writes: bool = True) -> None:
        """Remove a pool and its file; its running requests finish normally.

        Without `writes`, another server removes the file.
        Raises UnknownPool, PoolStoreError, and StateConflict for the base and the default pool.
        """
        await self.to_the_end(self._remove(name, writes))

    async def cut(self, name: str, request: CutRequest) -> PoolStatus:
        """Define a pool of another's best-scored experts; raises as `add` and `cut_pool` do."""
        pool = cut_pool(self._lookup.find(name), request, self._moe_layers)
        return (await self.add(pool))[0]

    def cuts_of(self, pool: ExpertPool) -> list[Cut]:
        """Return every size of a pool; raises RequestError if its file has no scores."""
        return cuts_of(pool, self._moe_layers, self._manager.slot_bytes)

    @property
    def _moe_layers(self) -> Sequence[MoeLayer | None]:
        assert self._catalog.moe_layers is not None, "the catalog must know the model"
        return self._catalog.moe_layers

    def check_add(self, pool: ExpertPool, *, replace: bool) -> None:
        """Raise what `add` would raise at once: RequestError, PoolExists or StateConflict."""
        self._plan_add(pool, replace=replace)

    def _plan_add(self, pool: ExpertPool, *, replace: bool) -> CatalogChange:
        assert self._catalog.moe_layers is not None, (
            "the catalog must know the model to check a pool"
        )
        try:
            self._lookup.names.check_free((pool.name,))
            return self._catalog.plan_add(pool, replace=replace)
        except (ConfigError, PoolFileError) as error:
            raise RequestError(str(error)) from error

    async def to_the_end(self, change: Coroutine[object, object, _T]) -> _T:
        """Await a change that continues even if the client that asked for it disconnects."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def _add(self, pool: ExpertPool, replace: bool, writes: bool) -> tuple[PoolStatus, bool]:
        async with self._one_change:
            change = self._plan_add(pool, replace=replace)
            assert change.pool is not None
            self._check_servable(change.pool)
            is_new = pool.name not in self._catalog.pools
            for name in await self._apply(change, writes):
                await self._pin_again(name, pool.name)
            return self._statuses.of(self._catalog.pools[pool.name]), is_new

    async def _remove(self, name: str, writes: bool) -> None:
        async with self._one_change:
            if name == BASE_POOL or name in self._lookup.names.base:
                raise StateConflict("the base pool is the model itself and cannot be removed")
            if name in pools_of(self._lookup.names.default_pool):
                raise StateConflict(
                    f"pool {name!r} is part of --default-pool, which serves requests that name no"
                    " pool, and cannot be removed"
                )
            try:
                change = self._catalog.plan_remove(name)
            except UnknownPool as error:
                raise self._lookup.explained(error) from None
            await self._apply(change, writes)
            await asyncio.to_thread(self._on_removed, name)

    async def _apply(self, change: CatalogChange, writes: bool) -> list[str]:
        """Carry out a change: retire the contents it replaces, and revive those it defines again.

        Returns the pinned names whose content has changed.
        """
        if writes:
            await asyncio.to_thread(change.write)
        old = self._containing(change.name)
        self._catalog.commit(change)
        if self._metrics is not None:
            show = self._metrics.remove_pool if change.pool is None else self._metrics.add_pool
            show(change.name)
        if change.pool is None:
            logger.info("pool %s was removed", change.name)
        else:
            version = self._catalog.version(change.name)
            logger.info("pool %s was defined, version %d", change.name, version)
        new = self._containing(change.name)
        kept = {(pool.name, pool.content_hash) for pool in new}
        replaced = [pool for pool in old if (pool.name, pool.content_hash) not in kept]
        pinned = self._residency.drop_pins(replaced)
        for pool in new:
            self._manager.revive(pool)
        current = {pool.content_hash for pool in (*self._lookup.pools, *new, *self._in_use())}
        current |= self._temporary.content_hashes
        # A request may have a router temperature of its own, and so a content that no name has.
        held = [pool for pool in self._manager.pools if change.name in pools_of(pool.name)]
        for pool in (*old, *held):
            if pool.content_hash not in current:
                self._manager.retire(pool)
        return pinned

    def _containing(self, name: str) -> list[ExpertPool]:
        """Return the pool of that name, and what is made of it and in use."""
        pool = self._lookup.known(name)
        made = [pool for pool in self._in_use() if name in pools_of(pool.name)]
        return made if pool is None or pool in made else [pool, *made]

    def _in_use(self) -> list[ExpertPool]:
        """Return the pools, sizes and unions that are resident, asked for or pinned by their name.

        Two names may have one content, as the smallest sizes of two pools often do.
        """
        names = set(self._residency.pinned_names)
        for entry in self._manager.statistics().pools:
            names |= entry.names
        found = map(self._lookup.known, sorted(names))
        return [pool for pool in found if pool is not None]

    async def _pin_again(self, name: str, redefined: str) -> None:
        try:
            await self._residency.load(name, pin=True)
        except EngineDead:
            raise
        except EmoServeError as error:
            text = f"pool {redefined!r} is redefined, but {name!r} is no longer pinned: {error}"
            logger.error("%s", text)
            if isinstance(error, Unavailable):
                raise Unavailable(text, error.retry_after_seconds) from error
            raise PoolLoadFailed(text) from error

    def _check_servable(self, pool: ExpertPool) -> None:
        """Refuse a definition with which the default pool, or a pinned pool, could not be served.

        Raises PoolTooLarge, and RequestError if a default or pinned union's temperatures would
        differ, or its size could not be had.
        """
        pinned = self._residency.pinned_names
        for name in dict.fromkeys([self._lookup.names.default_pool, *sorted(pinned)]):
            if pool.name not in pools_of(name) or BASE_POOL in pools_of(name):
                continue
            try:
                needed = self._catalog.resolve_with(name, pool)
            except UnknownPool as error:
                raise RequestError(
                    f"{name!r} is pinned or the default pool, and could not be served any more:"
                    f" {error}"
                ) from None
            self._manager.check_servable(needed, pinned=name in pinned)
            with suppress(Unavailable):  # temporary
                self._manager.check_admissible(needed)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved; a waiting caller gets it too
