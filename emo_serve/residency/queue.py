"""The waiting queue of pools, and the loads and evictions that move it on.

First come, first served, one place per pool:

- A pool that needs no copies, typically a union, costs only a row of the engine's pool table. It
  may pass the queue.
- The first waiting pool that needs copies may evict pools that are neither leased nor pinned, in
  the policy's order. If those do not make enough room, the coldest leased ones are *closed*: their
  requests run to the end, new ones wait in the queue, and after the last lease they are evicted.
- A pool further back may pass if it can be loaded without taking what the first is waiting for.
- A step of an elastic pool's growth comes after everything that is waited for, and closes nothing.
  A pool evicted for another may leave behind a smaller size of itself, if that has room.
- So a wait is bounded by the queue ahead: each place costs at most the longest running request and
  a load, plus a second load if another pool passed and is using the link when room is made.
- When a load is done, its waiters have their leases before any other request can ask.

`PendingPools` knows which pools are waited for, `ResidentPools` which ones have room, and
`RunningLoads` runs one load at a time; this module decides what happens next. Everything belongs to
one event loop, and between two awaits the tables are consistent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.elastic import NestedSizes
from emo_serve.residency.estimate import LeaseTimes, WaitEstimate
from emo_serve.residency.loads import RunningLoads
from emo_serve.residency.pending import PendingPools
from emo_serve.residency.policy import EvictionPolicy
from emo_serve.residency.ports import PoolEngine, ResidencyObserver
from emo_serve.residency.records import Ask, PendingPool, Purpose, ResidentPool, Waiter
from emo_serve.residency.refusals import Refusals
from emo_serve.residency.resident import ResidentPools
from emo_serve.residency.room import Room

__all__ = ["LoadQueue"]


class LoadQueue:
    """Decide which pool is let in, loaded, closed or evicted next; see the module for the rules."""

    def __init__(
        self,
        room: Room,
        resident: ResidentPools,
        engine: PoolEngine,
        policy: EvictionPolicy,
        observer: ResidencyObserver,
        clock: Callable[[], float],
        max_waiting: int,
        deadline_seconds: float,
        shrink_to: NestedSizes | None = None,
    ) -> None:
        self._room = room
        self._resident = resident
        self._policy = policy
        self._observer = observer
        self._clock = clock
        self._deadline_seconds = deadline_seconds
        self._shrink_to = shrink_to
        self._pending = PendingPools(room)
        self._loads = RunningLoads(resident, engine, observer, self._end_wait, self.schedule)
        self._times = LeaseTimes(clock)
        estimate = WaitEstimate(resident, self._pending, self._loads, self._times, clock)
        self._refusals = Refusals(room, resident, self._pending, estimate, max_waiting)
        self._closing_for: PendingPool | None = None  # the pool that others are closed for
        self._idle = asyncio.Event()

    # -- questions --

    @property
    def times(self) -> LeaseTimes:
        """Return the times of leases, which the manager notes."""
        return self._times

    @property
    def num_waiting(self) -> int:
        """Return how many requests and operators wait."""
        return self._pending.num_waiters

    @property
    def pending(self) -> tuple[PendingPool, ...]:
        """Return the pools that are waited for, in the order of the queue."""
        return tuple(self._pending)

    def check_may_wait(self, pool: ExpertPool) -> None:
        """Raise PoolTooLarge, PoolBlocked or TooManyWaiting unless a request may wait for it."""
        self._refusals.check_may_wait(pool, Purpose.LEASE)

    def may_begin(self, pool: ExpertPool) -> bool:
        """Tell whether a request for the pool would begin without a copy and without a turn."""
        if (resident := self._resident.get(pool.content_hash)) is not None:
            return resident.is_open
        if self._closing_for is not None or not self._room.covers(pool):
            return False
        return self._room.fits(self._room.demand(pool))

    def check_integrity(self) -> None:
        """Assert that slots, rows, leases and the queue agree."""
        self._resident.check_integrity()
        self._pending.check_integrity()
        self._loads.check_integrity()
        for pending in self._pending:
            assert self._resident.get_open(pending.key) is None, "a request waits for an open pool"
        is_any_closing = any(resident.is_closing for resident in self._resident)
        assert self._closing_for is not None or not is_any_closing

    # -- waiting --

    async def acquire(
        self, pool: ExpertPool, purpose: Purpose, *, is_counted: bool = False
    ) -> ResidentPool:
        """Make a pool resident, lease or pin it as `purpose` says, and return it.

        Waits in the queue if need be; with `is_counted`, the observer is told of the wait. Raises
        as `check_may_wait`, LoadDeadlineExceeded, and whatever the load raised.
        """
        key, ask = pool.content_hash, Ask(purpose, pool.name)
        if purpose is not Purpose.GROW:
            self._policy.note_asked(key, self._clock())
        if purpose is Purpose.PIN:
            self._resident.reopen(key)
        if (resident := self._resident.get_open(key)) is not None:
            self._grant(resident, ask)
            if purpose is Purpose.PIN:  # which may leave too little room for waiting pools
                self.schedule()
            return resident
        self._refusals.check_may_wait(pool, purpose)
        waiter = self._pending.join(pool, purpose)
        start, outcome = self._clock(), "failed"
        deadline = asyncio.timeout(self._deadline_seconds)
        try:
            self.schedule()
            async with deadline:
                resident = await waiter
            outcome = "granted"
            return resident
        except TimeoutError:
            if not deadline.expired():  # the load raised it
                raise
            outcome = "deadline"
            raise self._refusals.too_late(pool, self._deadline_seconds) from None
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            if outcome != "granted":
                self._leave(key, waiter, ask)
            if is_counted:
                self._observer.count_wait(pool.name, outcome, self._clock() - start)

    def _leave(self, key: str, waiter: Waiter, ask: Ask) -> None:
        """Give up a place in the queue, and any lease that was granted at the same moment."""
        is_granted = waiter.done() and not waiter.cancelled() and waiter.exception() is None
        if is_granted and ask.purpose is Purpose.LEASE:
            self.release(waiter.result(), ask.name)
        self._pending.leave(key, waiter)
        self.schedule()

    def release(self, resident: ResidentPool, name: str) -> None:
        """End a lease that was asked for by `name`."""
        self._resident.end_lease(resident, name)
        if not resident.leases:
            self.schedule()

    def unpin(self, key: str) -> None:
        """Let a pool be evicted like any other; a no-op for one that is not pinned."""
        self._resident.unpin(key)
        self.schedule()

    @contextmanager
    def draining(self, resident: ResidentPool) -> Iterator[None]:
        """Admit no requests to a pool and evict it after its last lease; on exit it opens again."""
        self._resident.start_drain(resident)
        self.schedule()
        try:
            yield
        finally:
            self._resident.end_drain(resident)
            self.schedule()

    def retire(self, key: str) -> None:
        """Unpin a pool and evict it after its last lease; waiting operators get StateConflict.

        Requests that wait for it, or were admitted and have yet to ask, are served first.
        """
        self._resident.retire(key)
        self._pending.turn_away_operators(key)
        self.schedule()

    def revive(self, key: str) -> None:
        """Let a retired pool stay, because it is defined again; a no-op for other pools."""
        if self._resident.revive(key):
            self.schedule()

    async def wait_until_idle(self) -> None:
        """Return once no lease is held or waited for."""
        while self._resident.num_leases or self.num_waiting:
            self._idle.clear()
            await self._idle.wait()

    def _grant(self, resident: ResidentPool, ask: Ask) -> None:
        if ask.purpose is Purpose.LEASE:
            self._resident.add_lease(resident, ask.name)
        elif ask.purpose is Purpose.PIN and not resident.is_retired:
            self._resident.pin(resident)
            self._turn_away_blocked()

    def _turn_away_blocked(self) -> None:
        """Turn away the waiters of every pool that no longer fits beside the pinned ones."""
        pinned = self._room.kept(self._resident.unpinned)
        for pending in self.pending:
            if not self._room.can_hold(pinned | pending.demand):
                self._pending.turn_away(pending, self._refusals.blocked(pending.pool))

    def _let_in(self, pending: PendingPool, resident: ResidentPool) -> None:
        for waiter, ask in self._pending.remove(pending):
            self._grant(resident, ask)
            waiter.set_result(resident)

    def _end_wait(self, pool: ExpertPool, error: Exception | None) -> None:
        """Let in or turn away a pool's waiters, before anything else may want the pool gone."""
        if (pending := self._pending.get(pool.content_hash)) is None:
            return
        if error is not None:
            self._pending.turn_away(pending, error)
        elif (resident := self._resident.get(pending.key)) is not None:
            self._let_in(pending, resident)

    # -- scheduling --

    def schedule(self) -> None:
        """Do all that can be done now: evict, let in, start loads. Never awaits."""
        while self._resident.evict_leaving() or self._serve_waiting():
            pass
        if not self._resident.num_leases and not self.num_waiting:
            self._idle.set()

    def _serve_waiting(self) -> bool:
        """Walk the queue once; True after a change that may let others in: walk it again."""
        if self._closing_for is not None and (
            self._closing_for not in self.pending or self._closing_for.is_growth
        ):
            self._reopen()
        for pending in self._pending:
            if (resident := self._resident.get_open(pending.key)) is not None:
                self._let_in(pending, resident)
                return True
        # The others are loading, on their way out, or no longer wanted.
        waiting = [p for p in self._pending if p.key not in self._resident and p.is_wanted]
        if not waiting:
            return False
        first, *others = [p for p in waiting if not p.is_growth] or waiting
        coldest_first = self._coldest_first()
        idle = [resident.key for resident in coldest_first if not resident.leases]
        victims = self._room.choose(first.demand, idle)
        if victims is not None and self._has_link(first):
            self._start(first, victims)
            return True
        if victims is None and not first.is_growth and self._close_for(first, coldest_first):
            return True
        reserved = {resident.key for resident in self._resident if resident.is_closing}
        reserved.update(victims or ())
        idle = [key for key in idle if key not in reserved]
        return self._let_pass(first, others, reserved, idle)

    def _let_pass(
        self, first: PendingPool, others: list[PendingPool], reserved: set[str], idle: list[str]
    ) -> bool:
        """Start a load behind the first pool, if the first loses nothing by it; True if so.

        `reserved` pools will be evicted for the first, `idle` ones may be evicted for the others.
        """
        at_least = first.demand | self._room.kept(reserved.union(idle))
        for pending in others:
            if not self._has_link(pending) or not self._room.can_hold(at_least | pending.demand):
                continue
            victims = self._room.choose(pending.demand, idle)
            both = first.demand | pending.demand
            if victims is not None and self._room.fits(both, without=reserved.union(victims)):
                self._start(pending, victims)
                return True
        return False

    def _start(self, pending: PendingPool, victims: list[str]) -> None:
        """Evict the victims and begin a load in their place."""
        staying = self._shrink(victims, pending)
        plan = self._room.plan(pending.pool, victims)
        if self._loads.start(pending.pool, plan, staying) and self._closing_for is pending:
            self._reopen()

    def _shrink(self, victims: list[str], pending: PendingPool) -> dict[str, str]:
        """Of each victim, the warmest first, have the largest size stay that fits as well.

        Returns the names of these sizes by victim.
        """
        staying: dict[str, str] = {}
        if self._shrink_to is None:
            return staying
        for key in reversed(victims):
            victim = self._resident.get(key)
            assert victim is not None
            nested = None if victim.is_retired else self._shrink_to(victim.pool)
            if nested is None:
                continue

            def fits(size: ExpertPool) -> bool:
                both = pending.demand | self._room.demand(size)
                return self._room.num_free_rows > 0 and self._room.fits(both, without=victims)

            k = nested.largest(fits)
            size = None if k is None else nested.at(k)
            if size is None or size.content_hash in victims:
                continue
            if size.content_hash not in self._resident:
                self._loads.start(size, self._room.plan(size, ()), {})  # a row; copies nothing
            staying[key] = size.name
        return staying

    def _has_link(self, pending: PendingPool) -> bool:
        """Tell whether the link is free, or not needed."""
        return not self._loads.is_copying or self._room.slots.covers_bits(pending.demand.experts)

    def _close_for(self, pending: PendingPool, coldest_first: list[ResidentPool]) -> bool:
        """Close the coldest pools that must go to make room; True if others opened instead.

        Closed pools are chosen first, or new leases could keep changing the choice. Pools that are
        still loading are chosen last; their waiters are let in after the load.
        """
        self._closing_for = pending
        loading = [resident.key for resident in self._resident if not resident.is_published]
        candidates = [resident.key for resident in coldest_first] + loading
        chosen = self._room.choose(pending.demand, candidates)
        assert chosen is not None, "only pins can prevent it, and then the request is refused"
        return self._resident.close_only(chosen)

    def _reopen(self) -> None:
        self._closing_for = None
        self._resident.close_only(())

    def _coldest_first(self) -> list[ResidentPool]:
        """Return the pools that may be evicted, in the order of eviction.

        Closed pools come first, then those whose eviction frees no slot: loading one of these again
        copies nothing.
        """
        evictable = {resident.key: resident for resident in self._resident.evictable}
        coldest_first = self._policy.coldest_first(list(evictable), self._clock())
        redundant = self._room.slots.redundant(coldest_first)
        return sorted(
            (evictable[key] for key in coldest_first),
            key=lambda resident: (not resident.is_closing, resident.key not in redundant),
        )
