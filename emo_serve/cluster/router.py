"""Which replica gets a request: one that has its pool, unless that is much busier than others.

The rules, for a pool and the replicas that take requests now. A replica is calm while it has at
most `calm_margin` more requests than the idlest one. It has a pool that is resident or loading, all
pools if it has the base pool, and a union if it has all its parts.

1. Of the replicas that have the pool, the calm one that comes first in the pool's order.
2. Else, of those to which this router sent the pool's requests lately, in the same way: what they
   load shows a moment later.
3. Else the idlest of all these, while it is no busier than `spread_margin` allows: a copy of the
   pool is not worth a load for a short burst.
4. Else, for a union, the calm replica that has most of its parts, since a load copies only what is
   missing.
5. Else the calm replica that comes first in the pool's order, of those where the pool fits with no
   eviction. If there are none, of those within half the margin: where loads evict other pools,
   the busier replica has more to lose.

A pool's order is a rendezvous hash, so routers agree without talking. By taking the first in order
and not the idlest, a pool's requests stay together: they fill one replica up to the margin, then
the next. So a hot pool has as many copies as its load needs. When that falls, the last copies get
no more requests, and the replicas' own policy evicts them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from emo_serve.cluster.asked import Asked
from emo_serve.cluster.recent import RecentlySent
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.errors import ConfigError
from emo_serve.names import BASE_POOL

__all__ = ["Choice", "PoolRouter", "ReplicaView", "RouterLimits", "Why"]


class Why(Enum):
    """Why a replica was chosen."""

    ANY = "any"
    RESIDENT = "resident"
    RECENT = "recent"
    BUSY = "busy"
    PARTS = "parts"
    NEW = "new"


@dataclass(frozen=True)
class ReplicaView:
    """One replica as a router knows it.

    `load` is its number of running and waiting requests. `pools` are the pools and unions that are
    resident or loading, in their canonical spelling. `fits` are absent pools that could be loaded
    with no eviction; it need not be complete.
    """

    name: str
    load: int
    pools: frozenset[str]
    fits: frozenset[str] = frozenset()

    def has(self, asked: Asked) -> bool:
        """Tell whether it would copy nothing for such a request, or is copying it already."""
        if asked.name in self.pools or BASE_POOL in self.pools:
            return True
        return not asked.is_anything and self.pools.issuperset(asked.parts)


@dataclass(frozen=True)
class RouterLimits:
    """When a replica counts as too busy, in requests more than the idlest has.

    `calm_margin` bounds what a pool's own replica may have; `spread_margin` is where another copy
    of the pool is made. `memory_seconds` should exceed the time until a replica's news arrive.
    """

    calm_margin: int
    spread_margin: int
    memory_seconds: float = 5.0

    @classmethod
    def of(cls, concurrency: int) -> RouterLimits:
        """Return the limits for replicas that run so many requests at once without queueing.

        Half of that is calm, and all of it bears a burst: of the margins tried, these came closest
        to an oracle (benchmarks/cluster/simulation.py --vary margins).
        """
        return cls(calm_margin=concurrency // 2, spread_margin=concurrency)

    def __post_init__(self) -> None:
        if not 0 <= self.calm_margin <= self.spread_margin:
            raise ConfigError(
                f"calm margin is {self.calm_margin} requests, spread margin {self.spread_margin};"
                " expected 0 or more, and the spread margin no smaller"
            )
        if not self.memory_seconds >= 0:
            raise ConfigError(f"memory is {self.memory_seconds} s; expected 0 or more")


@dataclass(frozen=True)
class Choice:
    """All replicas in the order to try them, and why the first is the first.

    After the first come those that have the pool, then the others, each group from the idlest on.
    """

    order: tuple[str, ...]
    why: Why


class PoolRouter:
    """Choose replicas for requests; remembers only what it has sent itself, for a few seconds."""

    def __init__(self, limits: RouterLimits, rng: random.Random | None = None) -> None:
        self.limits = limits
        self._rng = rng or random.Random()
        self._recent = RecentlySent(self.limits.memory_seconds)
        self._rendezvous = Rendezvous()

    def choose(self, asked: Asked, replicas: Sequence[ReplicaView], now: float) -> Choice:
        """Order the replicas for one request; `now` is in seconds of a clock that never goes back.

        Raises ConfigError without replicas. Call `note_sent` for the one that took the request.
        """
        if not replicas:
            raise ConfigError("there is no replica to choose from; expected at least one")
        by_load = sorted(replicas, key=lambda one: (one.load, self._rng.random()))
        if asked.is_anything:
            return _choice(by_load[0], by_load, Why.ANY)
        ranks = self._rendezvous.ranks(asked.name, [one.name for one in replicas])
        by_rank = sorted(replicas, key=lambda one: ranks[one.name])
        first, why = self._first(asked, by_rank, by_load, now)
        return _choice(first, sorted(by_load, key=lambda one: not one.has(asked)), why)

    def note_sent(self, asked: Asked, replica: str, now: float) -> None:
        """Remember that a request went to a replica."""
        if not asked.is_anything:
            self._recent.note(asked.name, replica, now)

    def _first(
        self,
        asked: Asked,
        by_rank: Sequence[ReplicaView],
        by_load: Sequence[ReplicaView],
        now: float,
    ) -> tuple[ReplicaView, Why]:
        idlest = by_load[0].load
        calm = [one for one in by_rank if one.load <= idlest + self.limits.calm_margin]
        for one in calm:
            if one.has(asked):
                return one, Why.RESIDENT
        for one in calm:
            if self._recent.has(asked.name, one.name, now):
                return one, Why.RECENT
        for one in by_load:
            if one.load > idlest + self.limits.spread_margin:
                break
            if one.has(asked) or self._recent.has(asked.name, one.name, now):
                return one, Why.BUSY
        return self._new_place(asked, calm, idlest)

    def _new_place(
        self, asked: Asked, calm: Sequence[ReplicaView], idlest: int
    ) -> tuple[ReplicaView, Why]:
        """Return where a pool that no replica can serve at once should be loaded."""
        most = max(calm, key=lambda one: len(one.pools.intersection(asked.parts)))
        if len(asked.parts) > 1 and most.pools.intersection(asked.parts):
            return most, Why.PARTS
        for one in calm:
            if asked.name in one.fits:
                return one, Why.NEW
        margin = self.limits.calm_margin // 2
        return next(one for one in calm if one.load <= idlest + margin), Why.NEW


def _choice(first: ReplicaView, others: Sequence[ReplicaView], why: Why) -> Choice:
    return Choice((first.name, *(one.name for one in others if one is not first)), why)
