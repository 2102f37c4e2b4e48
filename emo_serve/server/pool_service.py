"""From what a client wrote to a lease: names, the catalog and residency behind one small object.

Everything the HTTP side may ask of pools stands here, so that routes and the generation hook need
neither the catalog nor the manager, and tests of both need no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from emo_serve.config import BASE_POOL
from emo_serve.errors import UnknownPool
from emo_serve.metrics import MetricsSnapshot, PoolSnapshot
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.server.pool_choice import UNION, ModelNames, canonical_name

__all__ = ["PoolService", "PoolStatus"]


@dataclass(frozen=True)
class PoolStatus:
    """One pool as a client may see it; `num_bytes` counts its experts on all devices."""

    pool: ExpertPool
    is_default: bool
    is_resident: bool
    row: int | None
    running_requests: int
    num_bytes: int


class PoolService:
    """Find pools by what requests call them, and lend them."""

    def __init__(
        self,
        names: ModelNames,
        base_pool: ExpertPool,
        catalog: PoolCatalog,
        manager: ResidencyManager,
    ) -> None:
        names.check_free(tuple(catalog.pools))
        self.names = names
        self.manager = manager
        self.catalog = catalog
        self._base_pool = base_pool
        self.find(None)  # the default pool exists

    @property
    def pools(self) -> tuple[ExpertPool, ...]:
        """Return the base pool and then the catalog's, in order of name; no unions."""
        return (self._base_pool, *self.catalog.pools.values())

    def find(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Return the pool a request asks for, resident or not.

        Raises RequestError (PoolConflict, UnknownPool naming what exists).
        """
        name = self.names.choose(model, headers)
        parts = name.split(UNION)
        if BASE_POOL not in parts:
            return self._resolve(name)
        others = [part for part in parts if part != BASE_POOL]
        if others:
            self._resolve(UNION.join(others))  # the base pool holds every expert of the others
        return self._base_pool

    def admit(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Find the pool and raise, as HTTP statuses need it, unless it could be lent right now."""
        pool = self.find(model, headers)
        self.manager.check_available(pool)
        return pool

    def lease(self, pool: ExpertPool) -> AbstractAsyncContextManager[Lease]:
        """Hold a pool for one engine request."""
        return self.manager.lease(pool)

    def status(self, pool: ExpertPool) -> PoolStatus:
        """Return one pool's state now."""
        stats = self.manager.statistics()
        held = next((p for p in stats.pools if p.content_hash == pool.content_hash), None)
        default = canonical_name(self.names.default_pool)
        return PoolStatus(
            pool=pool,
            is_default=pool.name == default,
            is_resident=self.manager.is_resident(pool),
            row=held.row if held and held.is_published else None,
            running_requests=held.running_requests if held else 0,
            num_bytes=sum(map(len, pool.expert_ids)) * stats.slot_bytes,
        )

    def snapshot(self) -> MetricsSnapshot:
        """Return what the gauges show: every pool, and unions while they hold a row."""
        stats = self.manager.statistics()
        held = {entry.content_hash: entry for entry in stats.pools}
        pools: list[PoolSnapshot] = []
        for pool in self.pools:
            entry = held.pop(pool.content_hash, None)
            running = entry.running_requests if entry else 0
            pools.append(PoolSnapshot(pool.name, self.manager.is_resident(pool), running))
        pools += (PoolSnapshot(p.name, True, p.running_requests) for p in held.values())
        return MetricsSnapshot(tuple(pools), slots=stats.total_slots, slots_in_use=stats.used_slots)

    def _resolve(self, name: str) -> ExpertPool:
        try:
            return self.catalog.resolve(name)
        except UnknownPool as error:
            raise UnknownPool(f"{error}; the model itself is {self.names.base[0]!r}") from None
