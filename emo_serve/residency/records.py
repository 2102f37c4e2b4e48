"""The records of a pool that has room and of a pool that is waited for.

`ResidentPools` and `PendingPools` own them and alone change them; other classes only read them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.room import Demand

__all__ = ["Ask", "PendingPool", "Purpose", "ResidentPool", "Waiter"]


class Purpose(Enum):
    """What a waiting request or operator wants of the pool once it is resident.

    GROW is the server's own wish: a step of an elastic pool, which makes no request wait.
    """

    LEASE = "lease"
    PIN = "pin"
    LOAD = "load"
    GROW = "grow"


class Ask(NamedTuple):
    """What a waiter wants, and the name it asked for: pools of equal content are one pool here."""

    purpose: Purpose
    name: str


@dataclass(eq=False)
class ResidentPool:
    """One pool that was given slots and a row; until it is published, its load is running.

    `leases_by_name` counts its leases by the name that was asked for, without zeros. `drains`
    counts the operators who wait for its eviction; `gone` is set once it is evicted.
    """

    pool: ExpertPool
    row: int
    is_published: bool = False
    is_retired: bool = False
    is_closing: bool = False
    leases_by_name: Counter[str] = field(default_factory=Counter)
    drains: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        """Return the content hash."""
        return self.pool.content_hash

    @property
    def leases(self) -> int:
        """Return the leases held, whatever the name they asked for."""
        return self.leases_by_name.total()

    @property
    def is_open(self) -> bool:
        """Tell whether a lease on it can be had at once."""
        return self.is_published and not (self.is_retired or self.is_closing or self.drains)

    @property
    def is_leaving(self) -> bool:
        """Tell whether it is to be evicted now: retired or drained, and no longer leased."""
        has_to_go = self.is_retired or self.drains > 0
        return has_to_go and self.is_published and not self.leases


Waiter = asyncio.Future[ResidentPool]
"""One request or operator that waits: its future becomes the pool, resident, or an error."""


@dataclass(eq=False)
class PendingPool:
    """One pool that is waited for; all its waiters share its place in the queue."""

    pool: ExpertPool
    demand: Demand
    waiters: dict[Waiter, Ask] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the content hash."""
        return self.pool.content_hash

    @property
    def is_wanted(self) -> bool:
        """Tell whether any waiter is left; a cancelled one leaves a moment later."""
        return any(not waiter.done() for waiter in self.waiters)

    @property
    def is_growth(self) -> bool:
        """Tell whether no request and no operator waits for it, only the server itself."""
        return all(ask.purpose is Purpose.GROW for ask in self.waiters.values())

    @property
    def num_clients(self) -> int:
        """Return how many requests and operators wait for it."""
        return sum(ask.purpose is not Purpose.GROW for ask in self.waiters.values())
