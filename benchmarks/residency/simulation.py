"""Play a trace on the real ResidencyManager in virtual time.

Only the engine is a stand-in: a load takes a fixed overhead plus its bytes over the bandwidth, and
a request that has its lease holds it for the time the trace says, however many others run. So only
residency is compared: which requests wait, how long, and what is copied.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.residency.traces import Arrival, PoolSet
from benchmarks.residency.virtual_time import run
from emo_serve.errors import EmoServeError
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.policy import EvictionPolicy
from emo_serve.residency.ports import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds, SlotTable

__all__ = ["Belady", "Link", "Outcome", "simulate"]


class Belady:
    """Evict the pool whose next request is furthest away: an EvictionPolicy that knows the trace.

    The optimum for pools of equal size that share no experts; otherwise a strong reference.
    """

    name = "belady"

    def __init__(self, trace: Sequence[Arrival], pools: PoolSet) -> None:
        self._times: dict[str, list[float]] = {}
        for arrival in trace:
            key = pools.pools[arrival.pool].content_hash
            self._times.setdefault(key, []).append(arrival.at_seconds)

    def note_asked(self, key: str, now: float) -> None:
        """Learn nothing: everything is known."""

    def coldest_first(self, keys: Collection[str], now: float) -> list[str]:
        """Order by the time of the next request, the furthest first."""
        return sorted(keys, key=lambda key: (-self._next_use(key, now), key))

    def forget(self, key: str) -> None:
        """Forget nothing: the trace does not change."""

    def _next_use(self, key: str, now: float) -> float:
        times = self._times.get(key, [])
        index = bisect_right(times, now)
        return times[index] if index < len(times) else float("inf")


@dataclass(frozen=True)
class Link:
    """What a load costs: a fixed time, and its bytes over the bandwidth."""

    overhead_seconds: float
    bytes_per_second: float


@dataclass
class Outcome:
    """The outcome of one simulation. Waits are those of requests that were served."""

    requests: int
    hits: int = 0
    waits: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    loads: int = 0
    evictions: int = 0
    bytes_copied: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Return what is printed and plotted."""
        waits = sorted(self.waits)
        waited = [wait for wait in waits if wait > 0]
        return {
            "hit_rate": self.hits / self.requests,
            "served_share": len(waits) / self.requests,
            "served_per_second": len(waits) / self.seconds,
            "wait_p50": quantile(waits, 0.5),
            "wait_p99": quantile(waits, 0.99),
            "wait_mean": sum(waits) / max(1, len(waits)),
            "miss_wait_p50": quantile(waited, 0.5),
            "miss_wait_p99": quantile(waited, 0.99),
            "loads": self.loads,
            "evictions": self.evictions,
            "gib_copied": self.bytes_copied / 2**30,
            "refusals": dict(self.refusals),
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of the ordered values lies; 0 if there are none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Engine:
    """A PoolEngine that only takes time."""

    def __init__(self, link: Link, slot_bytes: int, outcome: Outcome) -> None:
        self._link = link
        self._slot_bytes = slot_bytes
        self._outcome = outcome

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Find every file in order."""

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Sleep as long as the copies would take."""
        num_bytes = len(copies) * self._slot_bytes
        seconds = self._link.overhead_seconds + num_bytes / self._link.bytes_per_second
        await asyncio.sleep(seconds)
        self._outcome.bytes_copied += num_bytes
        num_experts = sum(map(len, expert_ids))
        return LoadReport(num_experts, len(copies), 0, num_bytes, num_bytes, seconds)


def simulate(
    trace: Sequence[Arrival],
    pools: PoolSet,
    slots_per_layer: int,
    link: Link,
    policy: EvictionPolicy,
    manager_class: Callable[..., ResidencyManager] = ResidencyManager,
    **options: Any,
) -> Outcome:
    """Play the trace to its end; `options` are the manager's (max_waiting, ...)."""
    outcome = Outcome(len(trace))

    async def request(manager: ResidencyManager, arrival: Arrival) -> None:
        pool = pools.pools[arrival.pool]
        try:
            manager.check_admissible(pool)
            async with manager.lease(pool):
                outcome.waits.append(clock() - arrival.at_seconds)
                await asyncio.sleep(arrival.service_seconds)
        except EmoServeError as error:
            outcome.refusals[type(error).__name__] += 1

    def clock() -> float:
        return asyncio.get_running_loop().time()

    async def program() -> None:
        manager = manager_class(
            SlotTable(pools.experts_per_layer, slots_per_layer),
            len(pools.pools) + 1,
            _Engine(link, pools.slot_bytes, outcome),
            slot_bytes=pools.slot_bytes,
            policy=policy,
            clock=clock,
            **options,
        )
        async with asyncio.TaskGroup() as requests:
            for arrival in trace:
                await asyncio.sleep(arrival.at_seconds - clock())
                requests.create_task(request(manager, arrival))
        manager.check_integrity()
        stats = manager.statistics()
        assert not stats.running_requests and not stats.waiting_requests
        outcome.hits, outcome.loads, outcome.evictions = stats.hits, stats.loads, stats.evictions
        outcome.seconds = clock()

    run(program())
    return outcome
