"""What operators can see of pools: state, requests, and how many experts each shares with others.

Values only, made from the manager's statistics at one moment. "Resident pools" are those with a row
in the engine's pool table and all their experts in slots; pools of equal content count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from emo_serve.errors import Unavailable
from emo_serve.metrics import MetricsSnapshot, PoolSnapshot
from emo_serve.names import BASE_POOL, canonical_name, is_derived, is_sized, is_union, pools_of
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.sizes import sizes_of
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.slots import LayerMap
from emo_serve.residency.statistics import PoolResidency, PoolState, ResidencyStats
from emo_serve.server.pool_admin.activity import PoolActivity, PoolUse
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.vllm_plugin.contract import PoolUsage

__all__ = [
    "BuildProgress",
    "Overview",
    "PoolKind",
    "PoolStatus",
    "PoolStatuses",
    "Shares",
    "Sharing",
    "SlotMap",
]

PoolKind = Literal["base", "pool", "size", "union"]


@dataclass(frozen=True)
class Shares:
    """Numbers of a pool's experts in all layers together.

    `alone` are in slots for this pool only, `shared` also or only for other resident pools, and
    `missing` are in no slot.
    """

    alone: int
    shared: int
    missing: int


class Sharing:
    """Count, for each expert of each layer, the resident pools that hold it."""

    def __init__(self, resident: Iterable[ExpertPool]) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()
        self._keys: set[str] = set()
        for pool in resident:
            if pool.content_hash not in self._keys:
                self._keys.add(pool.content_hash)
                self._counts.update(_experts(pool))
        self._shares: dict[str, Shares] = {}

    def count(self, layer: int, expert: int) -> int:
        """Return how many resident pools hold one expert."""
        return self._counts[layer, expert]

    def shares(self, pool: ExpertPool) -> Shares:
        """Count a pool's experts by the resident pools that hold them."""
        key = pool.content_hash
        if key not in self._shares:
            self._shares[key] = self._counted(pool)
        return self._shares[key]

    def _counted(self, pool: ExpertPool) -> Shares:
        held = [self._counts[place] for place in _experts(pool)]
        missing = held.count(0)
        alone = held.count(1) if pool.content_hash in self._keys else 0
        return Shares(alone=alone, shared=len(held) - alone - missing, missing=missing)


@dataclass(frozen=True)
class PoolStatus:
    """One pool as a client may see it; `num_bytes` counts its experts on all devices.

    `state` is "absent" if the pool has no `row` in the pool table and is not waiting for one, but
    "streamed" if it needs nothing else.
    `is_resident` tells whether all its experts are in slots, whichever pool loaded them. `version`
    counts definitions since the start, None for a union; `is_stored` tells whether this definition
    survives a restart. `sizes` are those at which a pool can be asked for; None for a pool without
    scores, the base pool, and what is a size or a union itself. Requests are those that asked for
    this name: pools of equal content share all else.
    """

    pool: ExpertPool
    kind: PoolKind
    sizes: range | None
    version: int | None
    is_stored: bool
    is_default: bool
    is_resident: bool
    is_pinned: bool
    state: PoolState | Literal["absent"]
    row: int | None
    running_requests: int
    waiting_requests: int
    num_bytes: int
    shares: Shares
    use: PoolUse


@dataclass(frozen=True)
class BuildProgress:
    """A pool that is being built: each document passes once per layer, `done` of `total` times.

    `total` is 0 until the documents are tokenized.
    """

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Overview:
    """All pools at one moment: base pool, the catalog's, sizes and unions while they are in use.

    `refused` says which pool files were left out and why, `persists` whether changes to the catalog
    survive a restart.
    """

    pools: tuple[PoolStatus, ...]
    stats: ResidencyStats
    sharing: Sharing
    refused: tuple[str, ...]
    persists: bool
    building: BuildProgress | None


@dataclass(frozen=True)
class SlotMap:
    """What is in every slot; the holders of a slot are places in `pools`."""

    pools: tuple[ExpertPool, ...]
    layers: tuple[LayerMap, ...]


class PoolStatuses:
    """Report the state of pools, from the manager's statistics at one moment.

    `usage_of` asks the engine what a pool's content has used; None if no routing is recorded.
    `activity` knows what clients have asked for.
    """

    def __init__(
        self,
        lookup: PoolLookup,
        catalog: PoolCatalog,
        manager: ResidencyManager,
        usage_of: Callable[[ExpertPool], Awaitable[PoolUsage]] | None,
        activity: PoolActivity,
    ) -> None:
        self._lookup, self._catalog, self._manager = lookup, catalog, manager
        self._usage_of, self._activity = usage_of, activity
        self._building: BuildProgress | None = None
        self._last_sharing: tuple[frozenset[str], Sharing] = (frozenset(), Sharing(()))

    def of(self, pool: ExpertPool) -> PoolStatus:
        """Return one pool's state now."""
        stats = self._manager.statistics()
        return self._status(pool, stats, self._sharing(stats))

    async def usage(self, name: str) -> tuple[ExpertPool, PoolUsage]:
        """Return a pool and the expert counts of tokens routed in it since the engine started.

        Counts belong to the content: pools of equal experts and temperature share them, whatever
        their names, and a union has its own. Raises UnknownPool, EngineDead, and Unavailable if no
        routing is recorded.
        """
        pool = self._lookup.find(name)
        if self._usage_of is None:
            raise Unavailable("this server does not record which experts its pools use")
        return pool, await self._usage_of(pool)

    def overview(self) -> Overview:
        """Return every pool's state now, and sizes and unions while they are in use."""
        stats = self._manager.statistics()
        sharing = self._sharing(stats)
        names = {name for entry in stats.pools for name in entry.names}
        derived = filter(None, map(self._lookup.known, sorted(filter(is_derived, names))))
        pools = (*self._lookup.pools, *derived)
        statuses = tuple(self._status(pool, stats, sharing) for pool in pools)
        return Overview(
            statuses,
            stats,
            sharing,
            refused=tuple(map(str, self._catalog.refused)),
            persists=self._catalog.persists,
            building=self._building,
        )

    def note_build(self, progress: BuildProgress | None) -> None:
        """Note how far the pool is that is being built; None once it is built, or failed."""
        self._building = progress

    def slot_map(self) -> SlotMap:
        """Return what is in every slot now."""
        return SlotMap(*self._manager.slot_maps())

    def version(self) -> tuple[object, ...]:
        """Return a value that differs whenever `overview` does; much cheaper than that."""
        stats = self._manager.statistics()
        return stats, self._activity.version, self._catalog.revision, self._building

    def slots_version(self) -> int:
        """Return a number that grows whenever `slot_map` changes."""
        return self._manager.slots_version

    def snapshot(self) -> MetricsSnapshot:
        """Return what the gauges show: all pools, and others with running or waiting requests."""
        return _metrics_snapshot(self._lookup.pools, self._manager)

    def _sharing(self, stats: ResidencyStats) -> Sharing:
        by_hash = {pool.content_hash: pool for pool in self._lookup.pools}
        resident: list[ExpertPool] = []
        for entry in stats.pools:
            if entry.state in ("resident", "closing"):
                pool = by_hash.get(entry.content_hash) or self._lookup.known(entry.name)
                if pool is None or self._manager.is_streamed(pool):
                    continue
                if pool.content_hash == entry.content_hash:
                    resident.append(pool)
        keys = frozenset(pool.content_hash for pool in resident)
        if self._last_sharing[0] != keys:
            self._last_sharing = keys, Sharing(resident)
        return self._last_sharing[1]

    def _status(self, pool: ExpertPool, stats: ResidencyStats, sharing: Sharing) -> PoolStatus:
        held = next((p for p in stats.pools if p.content_hash == pool.content_hash), None)
        kind = self._kind(pool)
        return PoolStatus(
            pool=pool,
            kind=kind,
            sizes=sizes_of(pool, self._catalog.moe_layers),
            version=None if kind == "union" else self._catalog.version(*pools_of(pool.name)) or 1,
            is_stored=self._is_stored(pool.name),
            is_default=pool.name == canonical_name(self._lookup.names.default_pool),
            is_resident=self._manager.is_resident(pool),
            is_pinned=self._manager.is_pinned(pool),
            state=held.state if held else self._state_without_row(pool),
            row=held.row if held else None,
            running_requests=held.running_by_name.get(pool.name, 0) if held else 0,
            waiting_requests=held.waiting_by_name.get(pool.name, 0) if held else 0,
            num_bytes=sum(map(len, pool.expert_ids)) * stats.slot_bytes,
            shares=sharing.shares(pool),
            use=self._activity.use_of(pool.name),
        )

    def _state_without_row(self, pool: ExpertPool) -> Literal["streamed", "absent"]:
        return "streamed" if self._manager.is_streamed(pool) else "absent"

    def _kind(self, pool: ExpertPool) -> PoolKind:
        if pool is self._lookup.base_pool:
            return "base"
        if is_union(pool.name):
            return "union"
        return "size" if is_sized(pool.name) else "pool"

    def _is_stored(self, name: str) -> bool:
        return all(part == BASE_POOL or self._catalog.is_stored(part) for part in pools_of(name))


def _metrics_snapshot(pools: Iterable[ExpertPool], manager: ResidencyManager) -> MetricsSnapshot:
    """Return what the gauges show: these pools, and others with running or waiting requests."""
    stats = manager.statistics()
    held = {entry.content_hash: entry for entry in stats.pools}
    shown: list[PoolSnapshot] = []
    names: dict[str, set[str]] = {}  # by content hash
    for pool in pools:
        flags = manager.is_resident(pool), manager.is_pinned(pool)
        shown.append(_snapshot(pool.name, flags, held.get(pool.content_hash)))
        names.setdefault(pool.content_hash, set()).add(pool.name)
    for (
        key,
        entry,
    ) in held.items():  # derived pools, and what is gone but still has requests
        flags = entry.state in ("resident", "closing"), entry.is_pinned
        known = names.get(key)
        others = entry.names if known is None else _asked(entry) - known
        shown += [_snapshot(name, flags, entry) for name in sorted(others)]
    return MetricsSnapshot(
        pools=tuple(shown),
        slots=stats.total_slots,
        slots_in_use=stats.used_slots,
        slots_free=stats.free_slots,
        slots_leased=stats.leased_slots,
        slot_bytes=stats.slot_bytes,
    )


def _asked(entry: PoolResidency) -> set[str]:
    """Return the names that running and waiting requests have asked for."""
    return {*entry.running_by_name, *entry.waiting_by_name}


def _snapshot(name: str, flags: tuple[bool, bool], entry: PoolResidency | None) -> PoolSnapshot:
    running = entry.running_by_name.get(name, 0) if entry else 0
    waiting = entry.waiting_by_name.get(name, 0) if entry else 0
    return PoolSnapshot(name, *flags, running, waiting)


def _experts(pool: ExpertPool) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, ids in enumerate(pool.expert_ids) for expert in ids]
