"""The pools that are waited for, first come, first served, and the futures of their waiters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from emo_serve.errors import StateConflict
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.records import Ask, PendingPool, Purpose, Waiter
from emo_serve.residency.room import Room

__all__ = ["PendingPools"]


class PendingPools:
    """Own the places in the queue, one per pool; iterate over them in order.

    A pool keeps its place as long as it has waiters, including those whose future is done but whose
    task has not run since.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._pools: dict[str, PendingPool] = {}  # first come first

    # -- questions --

    def __iter__(self) -> Iterator[PendingPool]:
        return iter(self._pools.values())

    def __len__(self) -> int:
        return len(self._pools)

    def get(self, key: str) -> PendingPool | None:
        """Return the place of a pool; None for one that is not waited for."""
        return self._pools.get(key)

    @property
    def num_waiters(self) -> int:
        """Return how many requests and operators wait."""
        return sum(pending.num_clients for pending in self)

    # -- waiters --

    def join(self, pool: ExpertPool, purpose: Purpose) -> Waiter:
        """Wait for a pool: in its place if it has one, else in a new one at the end."""
        pending = self._pools.get(pool.content_hash)
        if pending is None:
            pending = PendingPool(pool, self._room.demand(pool))
            self._pools[pending.key] = pending
        waiter: Waiter = asyncio.get_running_loop().create_future()
        pending.waiters[waiter] = Ask(purpose, pool.name)
        return waiter

    def leave(self, key: str, waiter: Waiter) -> None:
        """Give up waiting; a no-op for a waiter that was let in or turned away."""
        pending = self._pools.get(key)
        if pending is None or waiter not in pending.waiters:
            return
        del pending.waiters[waiter]
        if not pending.waiters:
            del self._pools[key]

    def remove(self, pending: PendingPool) -> list[tuple[Waiter, Ask]]:
        """Remove a pool's place, and return its remaining waiters, each with what it wants."""
        del self._pools[pending.key]
        waiting = [pair for pair in pending.waiters.items() if not pair[0].done()]
        pending.waiters.clear()
        return waiting

    def turn_away(self, pending: PendingPool, error: Exception) -> None:
        """Remove a pool's place; all its waiters get the error."""
        for waiter, _ in self.remove(pending):
            waiter.set_exception(error)

    def turn_away_operators(self, key: str) -> None:
        """Give StateConflict to operators that wait for a retired pool; requests wait on."""
        if (pending := self._pools.get(key)) is None:
            return
        for waiter, ask in pending.waiters.items():
            if ask.purpose is not Purpose.LEASE and not waiter.done():
                name = pending.pool.name
                text = f"pool {name!r} was redefined or removed before it was loaded"
                waiter.set_exception(StateConflict(text))

    # -- self-check --

    def check_integrity(self) -> None:
        """Assert that every place is its pool's and is held by a waiter."""
        for key, pending in self._pools.items():
            assert key == pending.key
            assert pending.waiters, "a place in the queue without a waiter"
