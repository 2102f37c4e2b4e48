"""Who has room and who waits for it: the records that the waiting queue keeps, by content
hash."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.room import Demand

__all__ = ["Counts", "PendingPool", "Purpose", "ResidentPool"]


class Purpose(Enum):
    """What a waiting request or operator wants of the pool once it is resident."""

    LEASE = "lease"
    PIN = "pin"
    LOAD = "load"


@dataclass(eq=False)
class ResidentPool:
    """One pool that was given room. `drains` counts the operators who wait for it to go."""

    pool: ExpertPool
    row: int
    is_published: bool = False
    leases: int = 0
    is_retired: bool = False
    drains: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class PendingPool:
    """One pool that is waited for; all who wait for it share its place in the queue."""

    pool: ExpertPool
    demand: Demand
    waiters: dict[asyncio.Future[ResidentPool], Purpose] = field(default_factory=dict)

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody still waits; one who was cancelled leaves a moment later."""
        return any(not place.done() for place in self.waiters)


@dataclass
class Counts:
    """What has happened since the start."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0
