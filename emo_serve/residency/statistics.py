"""A snapshot of residency: frozen values for routes, metrics and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from emo_serve.residency.ports import LoadReport, ResidencyObserver
from emo_serve.residency.slots import LayerSlots

__all__ = ["EventCounts", "PoolResidency", "PoolState", "ResidencyStats"]

PoolState = Literal["waiting", "loading", "resident", "streamed", "closing"]
"""A pool that is `closing` admits no new requests; one that is `streamed` needs no slots."""


@dataclass(frozen=True)
class PoolResidency:
    """One pool that has a row in the engine's pool table, or requests that wait for one.

    Pools of equal content share a row and show the name first used: look up by `content_hash`. The
    requests are counted by the names that they asked for, without zeros.
    """

    name: str
    content_hash: str
    row: int | None
    state: PoolState
    is_pinned: bool
    running_by_name: Mapping[str, int]
    waiting_by_name: Mapping[str, int]

    @property
    def names(self) -> frozenset[str]:
        """Return the name that was used first, and those that requests have asked for."""
        return frozenset((self.name, *self.running_by_name, *self.waiting_by_name))

    @property
    def running_requests(self) -> int:
        """Return the running requests, whatever the name they asked for."""
        return sum(self.running_by_name.values())

    @property
    def waiting_requests(self) -> int:
        """Return the requests and operators that wait, whatever the name they asked for."""
        return sum(self.waiting_by_name.values())


@dataclass(frozen=True)
class ResidencyStats:
    """A snapshot of slots, rows, leases and the queue; events count from the server's start."""

    layers: tuple[LayerSlots, ...]
    pools: tuple[PoolResidency, ...]
    num_rows: int
    free_rows: int
    running_requests: int
    waiting_requests: int
    slot_bytes: int
    leased_slots: int
    hits: int
    misses: int
    loads: int
    failed_loads: int
    evictions: int
    is_draining: bool

    @property
    def total_slots(self) -> int:
        """Return the number of slots in all layers."""
        return sum(layer.slots for layer in self.layers)

    @property
    def free_slots(self) -> int:
        """Return the number of free slots in all layers."""
        return sum(layer.free for layer in self.layers)

    @property
    def used_slots(self) -> int:
        """Return the number of slots in all layers whose expert is resident or loading."""
        return self.total_slots - self.free_slots

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the used slots on all devices."""
        return self.used_slots * self.slot_bytes


class EventCounts:
    """A ResidencyObserver that counts events since the start and passes them on."""

    def __init__(self, observer: ResidencyObserver) -> None:
        self._observer = observer
        self.hits = 0
        self.misses = 0
        self.loads = 0
        self.failed_loads = 0
        self.evictions = 0

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Count a hit or a miss."""
        self.hits += is_hit
        self.misses += not is_hit
        self._observer.count_ask(pool, is_hit=is_hit)

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Pass on the end of a wait, which is not counted here."""
        self._observer.count_wait(pool, outcome, seconds)

    def count_load(self, pool: str, report: LoadReport) -> None:
        """Count a load that copied experts."""
        self.loads += 1
        self._observer.count_load(pool, report)

    def count_failed_load(self, pool: str) -> None:
        """Count a load that failed."""
        self.failed_loads += 1
        self._observer.count_failed_load(pool)

    def count_smaller(self, pool: str) -> None:
        """Pass on a request that a smaller size serves, which is not counted here."""
        self._observer.count_smaller(pool)

    def count_eviction(self, pool: str, reason: str) -> None:
        """Count an eviction, whatever its reason."""
        self.evictions += 1
        self._observer.count_eviction(pool, reason)
