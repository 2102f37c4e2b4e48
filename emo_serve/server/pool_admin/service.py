"""From what a client wrote to a lease, and from what an operator wrote to a change.

Everything the HTTP side may ask of pools stands here, so that routes and the generation hook need
neither the catalog nor the manager, and tests of both need no vLLM.

Definitions change one at a time, the file first. A request keeps the definition it was admitted
with: the old one's experts stay until its last request has ended, under its own content hash, so
that no answer mixes two definitions. What was pinned stays pinned by name: a redefinition loads and
pins the new content, of the pool and of pinned unions it is part of.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, suppress
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
from emo_serve.metrics import MetricsSnapshot, PoolMetrics
from emo_serve.names import (
    BASE_POOL,
    ModelNames,
    canonical_name,
    check_chosen,
    is_union,
    join_names,
    split_name,
)
from emo_serve.pools.catalog import CatalogChange, PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.residency.statistics import ResidencyStats
from emo_serve.server.pool_admin.status import (
    Overview,
    PoolKind,
    PoolStatus,
    Sharing,
    metrics_snapshot,
)
from emo_serve.server.vllm_adapter.worker_calls import PoolUsage

__all__ = ["PoolService"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class PoolService:
    """Find pools by what requests call them, lend them, and change them for operators.

    `usage_of` asks the engine what a pool's content has used; without it nobody can know.
    """

    def __init__(
        self,
        names: ModelNames,
        base_pool: ExpertPool,
        catalog: PoolCatalog,
        manager: ResidencyManager,
        metrics: PoolMetrics | None = None,
        usage_of: Callable[[ExpertPool], Awaitable[PoolUsage]] | None = None,
    ) -> None:
        names.check_free(tuple(catalog.pools))
        self.names = names
        self.manager = manager
        self.catalog = catalog
        self._metrics = metrics
        self._usage_of = usage_of
        self._base_pool = base_pool
        self._one_change = asyncio.Lock()
        self._changes: set[asyncio.Task[object]] = set()  # asyncio keeps weak references
        self._unnamed: Counter[str] = Counter()  # content hashes of pools without a name, by use
        self.find(None)  # the default pool exists

    @property
    def pools(self) -> tuple[ExpertPool, ...]:
        """Return the base pool and then the catalog's, in order of name; no unions."""
        return (self._base_pool, *self.catalog.pools.values())

    # -- requests --

    def find(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Return the pool a request asks for, resident or not.

        Raises RequestError (PoolConflict, UnknownPool naming what exists).
        """
        name = self.names.choose(model, headers)
        check_chosen(name)
        parts = split_name(name)
        if BASE_POOL not in parts:
            return self._resolve(name)
        others = [part for part in parts if part != BASE_POOL]
        if others:
            self._resolve(join_names(others))  # the base pool holds every expert of the others
        return self._base_pool

    def admit(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Find the pool and raise, as HTTP statuses need it, unless a request may wait for it."""
        pool = self.find(model, headers)
        self._admit(pool)
        return pool

    def lease(self, pool: ExpertPool) -> AbstractAsyncContextManager[Lease]:
        """Hold a pool for one engine request."""
        return self.manager.lease(pool)

    def _admit(self, pool: ExpertPool) -> None:
        """Admit a request for a pool that its name has just led to; raises as `admit` does.

        The pool is defined, so it may stay, even if its content was retired under an earlier
        definition. A union that was not in use when its parts were defined again is revived here.
        """
        self.manager.revive(pool)
        self.manager.check_admissible(pool)

    # -- residency, for operators --

    async def load(self, name: str, *, pin: bool = False) -> PoolStatus:
        """Make a pool or union resident, in the line that requests wait in; raises as they do."""
        pool = self.find(name)
        self._admit(pool)
        await self.manager.load(pool, pin=pin)
        return self.status(pool)

    async def evict(self, name: str, *, drain: bool = False) -> PoolStatus:
        """Take a pool's slots away as far as no other pool needs them; raises PoolInUse."""
        pool = self.find(name)
        await self.manager.evict(pool, drain=drain)
        return self.status(pool)

    async def pin(self, name: str) -> PoolStatus:
        """Make a pool resident and have it stay."""
        return await self.load(name, pin=True)

    def unpin(self, name: str) -> PoolStatus:
        """Let a pool be evicted like any other."""
        pool = self.find(name)
        self.manager.unpin(pool)
        return self.status(pool)

    # -- definitions --

    async def add(self, pool: ExpertPool, *, replace: bool = False) -> tuple[PoolStatus, bool]:
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

    def plan_add(self, pool: ExpertPool, *, replace: bool) -> CatalogChange:
        """Decide how to define a pool: what `add` checks first; changes nothing.

        Raises RequestError, PoolExists and StateConflict.
        """
        assert self.catalog.moe_layers is not None, "nobody could check the pool"
        try:
            self.names.check_free((pool.name,))
            return self.catalog.plan_add(pool, replace=replace)
        except (ConfigError, PoolFileError) as error:
            raise RequestError(str(error)) from error

    def keep(self, pool: ExpertPool) -> None:
        """Let a pool that no name leads to be leased and loaded, until `forget`, once for each."""
        self._unnamed[pool.content_hash] += 1
        self.manager.revive(pool)

    def forget(self, pool: ExpertPool) -> None:
        """End a `keep`: the pool goes, unless others keep it or a definition has its content."""
        self._unnamed[pool.content_hash] -= 1
        self._unnamed += Counter()  # drops what is 0
        is_defined = pool.content_hash in {known.content_hash for known in self.pools}
        is_pinned = self.manager.is_pinned(pool)  # a union of that content may be
        if not (pool.content_hash in self._unnamed or is_defined or is_pinned):
            self.manager.retire(pool)

    async def to_the_end(self, change: Coroutine[object, object, _T]) -> _T:
        """Await a change that goes on when the client who asked for it leaves."""
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def _add(self, pool: ExpertPool, replace: bool) -> tuple[PoolStatus, bool]:
        async with self._one_change:
            change = self.plan_add(pool, replace=replace)
            assert change.pool is not None
            self._check_wanted(change.pool)
            is_new = pool.name not in self.catalog.pools
            for name in await self._apply(change):
                await self._pin_again(name, pool.name)
            return self.status(self.catalog.pools[pool.name]), is_new

    async def _remove(self, name: str) -> None:
        async with self._one_change:
            if name == BASE_POOL or name in self.names.base:
                raise StateConflict("the base pool is the model itself and cannot be removed")
            if name in split_name(self.names.default_pool):
                raise StateConflict(
                    f"pool {name!r} is served to requests that name no pool (--default-pool) and"
                    " cannot be removed"
                )
            try:
                change = self.catalog.plan_remove(name)
            except UnknownPool as error:
                raise self._named(error) from None
            await self._apply(change)

    async def _apply(self, change: CatalogChange) -> list[str]:
        """Carry a change out, retire what it replaces and revive what it defines again.

        Returns the names that were pinned.
        """
        await asyncio.to_thread(change.write)
        old = self._made_of(change.name)
        self.catalog.commit(change)
        if self._metrics is not None:
            show = self._metrics.remove_pool if change.pool is None else self._metrics.add_pool
            show(change.name)
        if change.pool is None:
            logger.info("pool %s is removed", change.name)
        else:
            version = self.catalog.version(change.name)
            logger.info("pool %s is defined, version %d", change.name, version)
        pinned = [pool.name for pool in old if self.manager.is_pinned(pool)]
        new = self._made_of(change.name)
        for pool in new:
            self.manager.revive(pool)
        current = {pool.content_hash for pool in (*self.pools, *new)}
        current |= self._unnamed.keys()
        for pool in old:
            if pool.content_hash not in current:
                self.manager.retire(pool)
        return pinned

    def _made_of(self, name: str) -> list[ExpertPool]:
        """Return the pool of that name and the unions in use that it is part of."""
        in_use = {entry.name for entry in self.manager.statistics().pools}
        names = [name, *sorted(used for used in in_use if name in split_name(used))]
        found = (self._known(each) for each in dict.fromkeys(names))
        return [pool for pool in found if pool is not None]

    def _known(self, name: str) -> ExpertPool | None:
        try:
            return self.find(name)
        except RequestError:
            return None

    async def _pin_again(self, name: str, redefined: str) -> None:
        try:
            await self.load(name, pin=True)
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
        default = set(split_name(self.names.default_pool)) - {BASE_POOL}
        old = self.catalog.pools.get(pool.name)
        wanted = [pool] if old is not None and self.manager.is_pinned(old) else []
        if pool.name in default:
            others = (self.catalog.pools[name] for name in default - {pool.name})
            wanted.append(reduce(ExpertPool.union, others, pool))
        for needed in wanted:
            with suppress(Unavailable):  # that may pass
                self.manager.check_admissible(needed)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it, too

    # -- accounts --

    def status(self, pool: ExpertPool) -> PoolStatus:
        """Return one pool's state now."""
        stats = self.manager.statistics()
        return self._status(pool, stats, self._sharing(stats))

    async def usage(self, name: str) -> tuple[ExpertPool, PoolUsage]:
        """Return a pool and what was routed in it since the engine started.

        The account is of its content: pools of equal experts and temperature share one, whatever
        their names, and a union has its own. Raises Unavailable where no routing is recorded.
        """
        pool = self.find(name)
        if self._usage_of is None:
            raise Unavailable("this server does not record what its pools use")
        return pool, await self._usage_of(pool)

    def overview(self) -> Overview:
        """Return every pool's state now, and unions while they are in use."""
        stats = self.manager.statistics()
        sharing = self._sharing(stats)
        unions = {entry.name: self._known(entry.name) for entry in stats.pools}
        named = {
            pool.content_hash: pool for pool in unions.values() if pool and is_union(pool.name)
        }
        pools = (*self.pools, *sorted(named.values(), key=lambda pool: pool.name))
        statuses = tuple(self._status(pool, stats, sharing) for pool in pools)
        return Overview(statuses, stats, sharing)

    def snapshot(self) -> MetricsSnapshot:
        """Return what the gauges show: every pool, and others while requests hold or want them."""
        return metrics_snapshot(self.pools, self.manager)

    def _sharing(self, stats: ResidencyStats) -> Sharing:
        by_hash = {pool.content_hash: pool for pool in self.pools}
        resident: list[ExpertPool] = []
        for entry in stats.pools:
            if entry.state in ("resident", "closing"):
                pool = by_hash.get(entry.content_hash) or self._known(entry.name)
                if pool is not None and pool.content_hash == entry.content_hash:
                    resident.append(pool)
        return Sharing(resident)

    def _status(self, pool: ExpertPool, stats: ResidencyStats, sharing: Sharing) -> PoolStatus:
        held = next((p for p in stats.pools if p.content_hash == pool.content_hash), None)
        kind: PoolKind = "union" if is_union(pool.name) else "pool"
        if pool is self._base_pool:
            kind = "base"
        return PoolStatus(
            pool=pool,
            kind=kind,
            version=self.catalog.version(pool.name) or 1 if kind != "union" else None,
            is_stored=self._is_stored(pool.name),
            is_default=pool.name == canonical_name(self.names.default_pool),
            is_resident=self.manager.is_resident(pool),
            is_pinned=self.manager.is_pinned(pool),
            state=held.state if held else "absent",
            row=held.row if held else None,
            running_requests=held.running_requests if held else 0,
            waiting_requests=held.waiting_requests if held else 0,
            num_bytes=sum(map(len, pool.expert_ids)) * stats.slot_bytes,
            shares=sharing.shares(pool),
        )

    def _is_stored(self, name: str) -> bool:
        return all(part == BASE_POOL or self.catalog.is_stored(part) for part in split_name(name))

    def _resolve(self, name: str) -> ExpertPool:
        try:
            return self.catalog.resolve(name)
        except UnknownPool as error:
            raise self._named(error) from None

    def _named(self, error: UnknownPool) -> UnknownPool:
        return UnknownPool(f"{error}; the model itself is {self.names.base[0]!r}")
