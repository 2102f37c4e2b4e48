"""Replicas and proxies in virtual time, and what a trace makes of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cluster.replica import Answer, Replica, ReplicaSize
from benchmarks.cluster.strategies import Strategy, make_strategy
from benchmarks.residency.simulation import quantile
from benchmarks.residency.traces import Arrival, PoolSet
from benchmarks.residency.virtual_time import run
from emo_serve.cluster.asked import Asked
from emo_serve.cluster.router import ReplicaView, RouterLimits
from emo_serve.names import split_name

__all__ = ["Fleet", "FleetSettings", "Outcome", "play"]

_STALE_SECONDS = 10.0  # after which Ray Serve asks a replica again


@dataclass(frozen=True)
class FleetSettings:
    """The fleet around the replicas: proxies, how often residency is published, the router."""

    num_replicas: int
    limits: RouterLimits
    num_proxies: int = 2
    publish_seconds: float = 1.0
    seed: int = 1


@dataclass
class Outcome:
    """What came of one trace; `messages` are news of residency and questions for load."""

    num_replicas: int
    answers: list[Answer] = field(default_factory=list)
    loads: int = 0
    bytes_copied: int = 0
    messages: int = 0
    seconds: float = 0.0

    def figures(self, after_seconds: float = 0.0) -> dict[str, Any]:
        """Return figures of the requests that came after some time; the others warm up."""
        counted = [one for one in self.answers if one.arrival.at_seconds >= after_seconds]
        waits = sorted(one.wait_seconds for one in counted if one.wait_seconds is not None)
        served = Counter(one.replica for one in counted if one.wait_seconds is not None)
        return {
            "requests": len(counted),
            "hit_rate": sum(one.is_hit for one in counted) / len(counted),
            "refused": (len(counted) - len(waits)) / len(counted),
            "wait_p50": quantile(waits, 0.5),
            "wait_p99": quantile(waits, 0.99),
            "wait_mean": sum(waits) / max(1, len(waits)),
            "loads_per_100": 100 * self.loads / len(self.answers),
            "gib_copied": self.bytes_copied / 2**30,
            "imbalance": max(served.values()) * self.num_replicas / max(1, len(waits)),
            "messages_per_second": self.messages / self.seconds,
        }


class Fleet:
    """The replicas of one run, and what each proxy knows of them."""

    def __init__(
        self, pools: PoolSet, size: ReplicaSize, settings: FleetSettings, strategy: str
    ) -> None:
        self.settings = settings
        self.pools = pools
        self._size = size
        self.replicas: dict[str, Replica] = {}  # those that take requests
        self.all: list[Replica] = []
        self.add(settings.num_replicas)
        self.outcome = Outcome(settings.num_replicas)
        self._own: Counter[tuple[int, str]] = Counter()  # a proxy's requests at a replica
        self._others: dict[tuple[int, str], tuple[int, float]] = {}  # as last told, and when
        self._strategy: Strategy = make_strategy(
            strategy, settings.limits, settings.seed, self._wait
        )

    def add(self, count: int) -> None:
        """Have more replicas take requests; nothing is resident in them."""
        for number in range(len(self.all), len(self.all) + count):
            replica = Replica(f"replica-{number:02}", self.pools, self._size)
            self.all.append(replica)
            self.replicas[replica.name] = replica

    def remove(self, count: int) -> None:
        """Send no new requests to the newest replicas; what they have they finish."""
        for name in list(self.replicas)[-count:]:
            del self.replicas[name]

    async def request(self, number: int, arrival: Arrival) -> None:
        """Route one request and see it through."""
        loop = asyncio.get_running_loop()
        proxy = number % self.settings.num_proxies
        asked = Asked(arrival.pool, split_name(arrival.pool))
        chosen = self._strategy.choose(proxy, asked, self._views(proxy, loop.time()), loop.time())
        replica = self.replicas[chosen]
        self._own[proxy, chosen] += 1
        answering = asyncio.ensure_future(replica.answer(arrival, self.pools.pools[arrival.pool]))
        await asyncio.sleep(0)
        self._told(proxy, replica, loop.time())
        self.outcome.answers.append(await answering)
        self._own[proxy, chosen] -= 1
        self._told(proxy, replica, loop.time())

    async def publish(self) -> None:
        """Have every replica tell its news again and again, until cancelled."""
        while True:
            await asyncio.sleep(self.settings.publish_seconds)
            news = sum(replica.publish() for replica in self.replicas.values())
            self.outcome.messages += news * self.settings.num_proxies

    def _views(self, proxy: int, now: float) -> list[ReplicaView]:
        views = []
        for name, replica in self.replicas.items():
            others, told_at = self._others.get((proxy, name), (0, float("-inf")))
            if now - told_at > _STALE_SECONDS:
                self.outcome.messages += 1
                self._told(proxy, replica, now)
                others, _ = self._others[proxy, name]
            load = self._own[proxy, name] + others
            known = replica.published
            views.append(ReplicaView(name, load, known.pools, known.fits))
        return views

    def _told(self, proxy: int, replica: Replica, now: float) -> None:
        """Have a proxy learn a replica's load, which comes with every answer."""
        others = replica.load - self._own[proxy, replica.name]
        self._others[proxy, replica.name] = max(0, others), now

    def _wait(self, name: str, asked: Asked) -> tuple[float, float]:
        return self.replicas[name].wait_estimate(self.pools.pools[asked.name], 1.0)


def play(
    trace: Sequence[Arrival],
    pools: PoolSet,
    size: ReplicaSize,
    settings: FleetSettings,
    strategy: str,
    controller: Callable[[Fleet], Coroutine[Any, Any, None]] | None = None,
) -> Outcome:
    """Play a trace to its end; `controller` runs beside it and may change the fleet."""

    async def program() -> Outcome:
        fleet = Fleet(pools, size, settings, strategy)
        loop = asyncio.get_running_loop()
        beside = [asyncio.create_task(fleet.publish())]
        if controller is not None:
            beside.append(asyncio.create_task(controller(fleet)))
        async with asyncio.TaskGroup() as requests:
            for number, arrival in enumerate(trace):
                await asyncio.sleep(arrival.at_seconds - loop.time())
                requests.create_task(fleet.request(number, arrival))
        for task in beside:
            task.cancel()
        outcome = fleet.outcome
        for replica in fleet.all:
            replica.manager.check_integrity()
            assert not replica.load
            outcome.loads += replica.manager.statistics().loads
            outcome.bytes_copied += replica.bytes_copied
        outcome.seconds = loop.time()
        return outcome

    return run(program())
