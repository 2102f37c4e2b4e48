"""What an operator may see of pools: state, requests, and whom each shares its experts with.

Values only, made from the manager's statistics at one moment. "Resident pools" are those that have
a row of the engine's pool table and all their experts in slots; pools of equal content count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from emo_serve.metrics import MetricsSnapshot, PoolSnapshot
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.statistics import PoolState, ResidencyStats

__all__ = ["Overview", "PoolKind", "PoolStatus", "Shares", "Sharing", "metrics_snapshot"]

PoolKind = Literal["base", "pool", "union"]


@dataclass(frozen=True)
class Shares:
    """A pool's experts, all layers together, by who holds them in slots."""

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

    def count(self, layer: int, expert: int) -> int:
        """Return how many resident pools hold one expert."""
        return self._counts[layer, expert]

    def shares(self, pool: ExpertPool) -> Shares:
        """Split a pool's experts: held by it alone, by others too (or only), by nobody."""
        held = [self._counts[place] for place in _experts(pool)]
        missing = held.count(0)
        alone = held.count(1) if pool.content_hash in self._keys else 0
        return Shares(alone=alone, shared=len(held) - alone - missing, missing=missing)


@dataclass(frozen=True)
class PoolStatus:
    """One pool as a client may see it; `num_bytes` counts its experts on all devices.

    `state` is "absent" without a row of the pool table. `is_resident` tells whether its experts are
    in slots, whoever brought them. `version` counts definitions since the start, None for a union;
    `is_stored` tells whether a restart brings this definition back.
    """

    pool: ExpertPool
    kind: PoolKind
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


@dataclass(frozen=True)
class Overview:
    """All pools at one moment: the base pool, the catalog's, and unions while they are in use."""

    pools: tuple[PoolStatus, ...]
    stats: ResidencyStats
    sharing: Sharing


def metrics_snapshot(pools: Iterable[ExpertPool], manager: ResidencyManager) -> MetricsSnapshot:
    """Return what the gauges show: these pools, and others while requests hold or want them."""
    stats = manager.statistics()
    held = {entry.content_hash: entry for entry in stats.pools}
    shown: list[PoolSnapshot] = []
    for pool in pools:
        entry = held.pop(pool.content_hash, None)
        shown.append(
            PoolSnapshot(
                name=pool.name,
                is_resident=manager.is_resident(pool),
                is_pinned=manager.is_pinned(pool),
                running_requests=entry.running_requests if entry else 0,
                waiting_requests=entry.waiting_requests if entry else 0,
            )
        )
    for entry in held.values():  # unions, and old definitions with running requests
        is_resident = entry.state in ("resident", "closing")
        requests = entry.running_requests, entry.waiting_requests
        shown.append(PoolSnapshot(entry.name, is_resident, entry.is_pinned, *requests))
    return MetricsSnapshot(
        pools=tuple(shown),
        slots=stats.total_slots,
        slots_in_use=stats.used_slots,
        slots_free=stats.free_slots,
        slots_leased=stats.leased_slots,
        slot_bytes=stats.slot_bytes,
    )


def _experts(pool: ExpertPool) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, ids in enumerate(pool.expert_ids) for expert in ids]
