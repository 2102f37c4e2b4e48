"""The router of a fleet that learns everything about its replicas from what they publish.

    {"pools": ["base", "math"], "fits": ["law"], "known": ["code", "law", "math"],
     "base": ["emo"], "default": "base", "concurrency": 64}

A replica that has published nothing yet gets requests for pools that no other has.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emo_serve.cluster.asked import ANYTHING, Asked, read_asked
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.cluster.router import PoolRouter, ReplicaView, RouterLimits
from emo_serve.cluster.ticket import Ticket
from emo_serve.names import ModelNames

__all__ = ["CHANGES", "FleetRouter", "Known", "published"]

CHANGES = "/v1/pools"
"""What all changes to pools ask for, so that they find one replica. No pool has this name."""

_UNKNOWN_CONCURRENCY = 16


@dataclass(frozen=True)
class Known:
    """One replica: its name, its number of requests, and what it has published."""

    name: str
    load: int
    stats: Mapping[str, Any]


def published(
    *,
    pools: Sequence[str],
    fits: Sequence[str],
    known: Sequence[str],
    names: ModelNames,
    concurrency: int,
) -> dict[str, Any]:
    """Return what a replica publishes: names only, so that it changes seldom."""
    return {
        "pools": sorted(pools),
        "fits": sorted(fits),
        "known": sorted(known),
        "base": list(names.base),
        "default": names.default_pool,
        "concurrency": concurrency,
    }


class FleetRouter:
    """Order replicas for tickets; one object for each router process."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._router = PoolRouter(RouterLimits.of(_UNKNOWN_CONCURRENCY), self._rng)
        self._told: list[Mapping[str, Any]] = []
        self._rendezvous = Rendezvous()

    def order(self, ticket: Ticket, replicas: Sequence[Known], now: float) -> tuple[str, ...]:
        """Return the names of all replicas in the order to try them; empty without replicas.

        A replica that the ticket names is the only one.
        """
        if not replicas:
            return ()
        if ticket.replica is not None and ticket.replica in {one.name for one in replicas}:
            return (ticket.replica,)
        if ticket.is_change:
            return tuple(self._rendezvous.ranks(CHANGES, [one.name for one in replicas]))
        self._fit_limits(replicas)
        views = [_view(one) for one in replicas]
        return self._router.choose(self._asked(ticket, replicas), views, now).order

    def note_sent(
        self, ticket: Ticket, replica: str, replicas: Sequence[Known], now: float
    ) -> None:
        """Remember that a request went to a replica."""
        if not ticket.is_change:
            self._router.note_sent(self._asked(ticket, replicas), replica, now)

    def _asked(self, ticket: Ticket, replicas: Sequence[Known]) -> Asked:
        told = [one.stats for one in replicas if one.stats]
        if not told:
            return ANYTHING
        if told != self._told:  # the same objects, so cheap to compare, until a replica publishes
            self._told = told
            self._names = ModelNames(tuple(told[0]["base"]), told[0]["default"])
            self._pools = frozenset[str]().union(*(stats["known"] for stats in told))
        return read_asked(self._names, self._pools, ticket.model, ticket.headers)

    def _fit_limits(self, replicas: Sequence[Known]) -> None:
        """Take the margins from what the replicas run at once; what was sent is forgotten then."""
        told = [one.stats["concurrency"] for one in replicas if one.stats]
        if told and (limits := RouterLimits.of(min(told))) != self._router.limits:
            self._router = PoolRouter(limits, self._rng)


def _view(replica: Known) -> ReplicaView:
    pools, fits = replica.stats.get("pools", ()), replica.stats.get("fits", ())
    return ReplicaView(replica.name, replica.load, frozenset(pools), frozenset(fits))
