"""Definitions of pools that change while the server runs: add, redefine, remove.

They change one at a time, the file first. A request keeps the definition it was admitted with: the
old one's experts stay until its last request has ended, under its own content hash, so that no
answer mixes two definitions. What was pinned stays pinned by name: a redefinition loads and pins
the new content, of the pool and of pinned unions it is part of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from functools import reduce
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
from emo_serve.metrics import PoolMetrics
from emo_serve.names import BASE_POOL, split_name
from emo_serve.pools.catalog import CatalogChange, PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.pool_admin.residency import NamedResidency
from emo_serve.server.pool_admin.temporary import TemporaryPools

__all__ = ["PoolDefinitions"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class PoolDefinitions:
    """Change the catalog of a running server, and what follows from it for residency."""

    def __init__(
        self,
        lookup: PoolLookup,
        catalog: PoolCatalog,
        manager: ResidencyManager,
        temporary: TemporaryPools,
        metrics: PoolMetrics | None,
    ) -> None:
        self._lookup, self._catalog, self._manager = lookup, catalog, manager
        self._residency = NamedResidency(lookup, manager)
        self._temporary, self._metrics = temporary, metrics
        self._one_change = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()  # asyncio keeps weak references

    async def add(self, pool: ExpertPool, *, replace: bool = False) -> tuple[ExpertPool, bool]:
        """Define a pool, or with `replace` redefine it; return it and whether it is new.

        It is checked against the model. Raises RequestError, PoolExists, StateConflict and
        PoolStoreError before anything has changed. If a redefined pool was pinned and the new
        content cannot be made resident, that is raised with the pool redefined and not pinned.
        """
        return await self.to_the_end(self._add(pool, replace))

    async def remove(self, name: str) -> None:
        """Forget a pool; its running requests end as they would have.

        Raises UnknownPool, StateConflict for the base and the default pool, PoolStoreError.
        """
        await self.to_the_end(self._remove(name))

    def check_add(self, pool: ExpertPool, *, replace: bool) -> None:
        """Raise what `add` would refuse at once: RequestError, PoolExists and StateConflict."""
        self._plan_add(pool, replace=replace)

    def _plan_add(self, pool: ExpertPool, *, replace: bool) -> CatalogChange:
        assert self._catalog.moe_layers is not None, "only with the model can a pool be checked"
        try:
            self._lookup.names.check_free((pool.name,))
            return self._catalog.plan_add(pool, replace=replace)
        except (ConfigError, PoolFileError) as error:
            raise RequestError(str(error)) from error

    async def to_the_end(self, change: Coroutine[object, object, _T]) -> _T:
        """Await a change that goes on when the client who asked for it leaves."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def _add(self, pool: ExpertPool, replace: bool) -> tuple[ExpertPool, bool]:
        async with self._one_change:
            change = self._plan_add(pool, replace=replace)
            assert change.pool is not None
            self._check_wanted(change.pool)
            is_new = pool.name not in self._catalog.pools
            for name in await self._apply(change):
                await self._pin_again(name, pool.name)
            return self._catalog.pools[pool.name], is_new

    async def _remove(self, name: str) -> None:
        async with self._one_change:
            if name == BASE_POOL or name in self._lookup.names.base:
                raise StateConflict("the base pool is the model itself and cannot be removed")
            if name in split_name(self._lookup.names.default_pool):
                raise StateConflict(
                    f"pool {name!r} is served to requests that name no pool (--default-pool) and"
                    " cannot be removed"
                )
            try:
                change = self._catalog.plan_remove(name)
            except UnknownPool as error:
                raise self._lookup.explained(error) from None
            await self._apply(change)

    async def _apply(self, change: CatalogChange) -> list[str]:
        """Carry a change out, retire what it replaces and revive what it defines again.

        Returns the names that were pinned.
        """
        await asyncio.to_thread(change.write)
        old = self._made_of(change.name)
        self._catalog.commit(change)
        if self._metrics is not None:
            show = self._metrics.remove_pool if change.pool is None else self._metrics.add_pool
            show(change.name)
        if change.pool is None:
            logger.info("pool %s is removed", change.name)
        else:
            version = self._catalog.version(change.name)
            logger.info("pool %s is defined, version %d", change.name, version)
        pinned = [pool.name for pool in old if self._manager.is_pinned(pool)]
        new = self._made_of(change.name)
        for pool in new:
            self._manager.revive(pool)
        current = {pool.content_hash for pool in (*self._lookup.pools, *new)}
        current |= self._temporary.content_hashes
        for pool in old:
            if pool.content_hash not in current:
                self._manager.retire(pool)
        return pinned

    def _made_of(self, name: str) -> list[ExpertPool]:
        """Return the pool of that name and the unions in use that it is part of."""
        in_use = {entry.name for entry in self._manager.statistics().pools}
        names = [name, *sorted(used for used in in_use if name in split_name(used))]
        found = (self._lookup.known(each) for each in dict.fromkeys(names))
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

    def _check_wanted(self, pool: ExpertPool) -> None:
        """Refuse a definition that leaves the default pool, or a pin, with what cannot be served.

        Raises PoolTooLarge, and RequestError for a default union of two temperatures.
        """
        default = set(split_name(self._lookup.names.default_pool)) - {BASE_POOL}
        old = self._catalog.pools.get(pool.name)
        wanted = [pool] if old is not None and self._manager.is_pinned(old) else []
        if pool.name in default:
            others = (self._catalog.pools[name] for name in default - {pool.name})
            wanted.append(reduce(ExpertPool.union, others, pool))
        for needed in wanted:
            with suppress(Unavailable):  # that may pass
                self._manager.check_admissible(needed)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it, too
