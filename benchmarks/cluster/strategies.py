"""Ways to choose a replica: ours, three that know nothing of pools or of load, and an oracle.

Each is asked by one of several proxies, which know of other proxies' requests only what a replica
told them last. The oracle alone sees every replica as it is.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

from emo_serve.cluster.asked import Asked
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.cluster.router import PoolRouter, ReplicaView, RouterLimits

__all__ = [
    "STRATEGIES",
    "Affinity",
    "ConsistentHash",
    "Oracle",
    "PowerOfTwo",
    "RoundRobin",
    "Strategy",
    "make_strategy",
]

STRATEGIES = ("affinity", "round-robin", "power-of-two", "consistent-hash", "oracle")


class Strategy(Protocol):
    """Choose replicas for all proxies."""

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Return the name of the replica that gets a request, which it will take."""
        ...


class Affinity:
    """The real PoolRouter, one for each proxy."""

    def __init__(self, limits: RouterLimits, seed: int) -> None:
        self._routers: defaultdict[int, PoolRouter] = defaultdict(
            lambda: PoolRouter(limits, random.Random(seed))
        )

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Ask the proxy's router."""
        router = self._routers[proxy]
        chosen = router.choose(asked, views, now).order[0]
        router.note_sent(asked, chosen, now)
        return chosen


class RoundRobin:
    """Each proxy takes the replicas in turn."""

    def __init__(self) -> None:
        self._turns: defaultdict[int, int] = defaultdict(int)

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Return the next one."""
        self._turns[proxy] += 1
        return views[(proxy + self._turns[proxy]) % len(views)].name


class PowerOfTwo:
    """Of two replicas drawn by chance, the one with fewer requests: Ray Serve's default."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Return the idler one."""
        return min(self._rng.sample(views, min(2, len(views))), key=lambda one: one.load).name


class ConsistentHash:
    """Each pool has one replica, whatever its load."""

    def __init__(self) -> None:
        self._rendezvous = Rendezvous()

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Return the first in the pool's order."""
        ranks = self._rendezvous.ranks(asked.name, [view.name for view in views])
        return min(ranks, key=ranks.__getitem__)


class Oracle:
    """The replica on which the request begins soonest, as all are at this very moment.

    Greedy: it does not know what comes next. `wait` estimates the seconds from now, by replica.
    """

    def __init__(self, wait: Callable[[str, Asked], tuple[float, float]]) -> None:
        self._wait = wait

    def choose(self, proxy: int, asked: Asked, views: Sequence[ReplicaView], now: float) -> str:
        """Return the best one."""
        return min((view.name for view in views), key=lambda name: self._wait(name, asked))


def make_strategy(
    name: str, limits: RouterLimits, seed: int, wait: Callable[[str, Asked], tuple[float, float]]
) -> Strategy:
    """Return a strategy by its name in STRATEGIES."""
    made: dict[str, Callable[[], Strategy]] = {
        "affinity": lambda: Affinity(limits, seed),
        "round-robin": RoundRobin,
        "power-of-two": lambda: PowerOfTwo(seed),
        "consistent-hash": ConsistentHash,
        "oracle": lambda: Oracle(wait),
    }
    return made[name]()
