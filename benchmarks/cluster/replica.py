"""One replica in virtual time: the real ResidencyManager around an engine that only takes time.

The engine runs `max_running` requests at once, each as long as its trace says, and queues the
others; a request holds its lease from before it queues. A load takes a fixed time plus its bytes
over the bandwidth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from benchmarks.residency.simulation import Link
from benchmarks.residency.traces import Arrival, PoolSet
from emo_serve.errors import EmoServeError
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.policy import LfuPolicy
from emo_serve.residency.ports import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds, SlotTable

__all__ = ["Answer", "Published", "Replica", "ReplicaSize"]

_MANY = 100  # absent pools that are asked whether they fit


@dataclass(frozen=True)
class ReplicaSize:
    """What one replica can do."""

    slots_per_layer: int
    max_running: int
    max_pools: int
    link: Link


@dataclass(frozen=True)
class Published:
    """What a replica tells all proxies: what it has, and what it could load with no eviction."""

    pools: frozenset[str] = frozenset()
    fits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Answer:
    """How one request went; `wait_seconds` until it ran, None if it was refused."""

    arrival: Arrival
    replica: str
    is_hit: bool
    wait_seconds: float | None


class Replica:
    """Answer requests, and know what it would publish."""

    def __init__(self, name: str, pools: PoolSet, size: ReplicaSize) -> None:
        self.name = name
        self.size = size
        self.load = 0
        self.published = Published()
        self._pools = pools
        self._turns = asyncio.Semaphore(size.max_running)
        self._seen: object = None
        self.bytes_copied = 0
        self.manager = ResidencyManager(
            SlotTable(pools.experts_per_layer, size.slots_per_layer),
            size.max_pools,
            self,
            slot_bytes=pools.slot_bytes,
            policy=LfuPolicy(),
            max_waiting=1024,
            clock=asyncio.get_running_loop().time,
        )

    # -- PoolEngine --

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Find every file in order."""

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Sleep as long as the copies would take."""
        num_bytes = len(copies) * self._pools.slot_bytes
        seconds = self.seconds_of(num_bytes)
        await asyncio.sleep(seconds)
        self.bytes_copied += num_bytes
        num_experts = sum(map(len, expert_ids))
        return LoadReport(num_experts, len(copies), 0, num_bytes, num_bytes, seconds)

    def seconds_of(self, num_bytes: float) -> float:
        """Return how long it takes to load so much."""
        return self.size.link.overhead_seconds + num_bytes / self.size.link.bytes_per_second

    # -- requests --

    async def answer(self, arrival: Arrival, pool: ExpertPool) -> Answer:
        """Answer one request, or refuse it."""
        clock = asyncio.get_running_loop().time
        self.load += 1
        try:
            self.manager.check_admissible(pool)
            async with self.manager.lease(pool) as lease, self._turns:
                wait = clock() - arrival.at_seconds
                await asyncio.sleep(arrival.service_seconds)
                return Answer(arrival, self.name, lease.is_hit, wait)
        except EmoServeError:
            return Answer(arrival, self.name, False, None)
        finally:
            self.load -= 1

    # -- what others know --

    def publish(self) -> bool:
        """Publish what is resident or loading now; tell whether it was news."""
        held = self.manager.statistics().pools
        seen = [(entry.name, entry.state) for entry in held if entry.state != "waiting"]
        if seen == self._seen:
            return False
        self._seen = seen
        here = {name for name, state in seen if state != "closing"}
        absent = (pool for pool in self._pools.pools.values() if pool.name not in here)
        fits = (pool.name for pool in islice(absent, _MANY) if self.manager.fits_now(pool))
        news = Published(frozenset(here), frozenset(fits))
        is_news, self.published = news != self.published, news
        return is_news

    def wait_estimate(self, pool: ExpertPool, service_seconds: float) -> tuple[float, float]:
        """Return the seconds until a request would run, and its load, to break ties."""
        queued = max(0, self.load + 1 - self.size.max_running)
        seconds = queued * service_seconds / self.size.max_running
        if not self.manager.would_hit(pool):
            seconds += self.seconds_of(sum(map(len, pool.expert_ids)) * self._pools.slot_bytes)
            if not self.manager.fits_now(pool):
                seconds += service_seconds  # another pool must go first
        return seconds, self.load
