"""The waiting queue of pools, and the loads and evictions that move it on.

First come, first served, one place per pool:

- A pool that needs nothing copied, a union above all, costs a row of the engine's pool table and is
  let in past the queue.
- The first waiting pool that needs copies may evict pools that are neither leased nor pinned, in
  the policy's order. If those do not make room, the coldest leased ones are *closed*: their
  requests run to the end, new ones wait behind, and when the last lease is back they are evicted.
- A pool further back may pass when it can be loaded without taking what the first is waiting for.
- So a wait is bounded by the queue ahead: each place costs at most the longest running request and
  a load, and a second load if another pool passed and has the link when the room is there.
- When a load is done its waiters have their leases before anybody else can ask.

One load at a time: they share one link to the device. Loads are tasks of the queue's own, so that a
client that goes away neither interrupts nor repeats them. Everything here belongs to one event
loop; between two awaits the tables are consistent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable

from emo_serve.errors import (
    EngineDead,
    LoadDeadlineExceeded,
    PoolBlocked,
    StateConflict,
    TooManyWaiting,
)
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.policy import EvictionPolicy
from emo_serve.residency.ports import LoadReport, PoolEngine, ResidencyObserver
from emo_serve.residency.records import Counts, PendingPool, Purpose, ResidentPool
from emo_serve.residency.room import Room
from emo_serve.residency.slots import LoadPlan

__all__ = ["LoadQueue"]

logger = logging.getLogger(__name__)

_REMEMBERED_RETIRED = 4096  # definitions whose stragglers are known; they ask within a moment


class LoadQueue:
    """Own who has room and who waits for it; see the module for the rules.

    `entries`, `wants` and `pinned` go by content hash and are for others to read.
    """

    def __init__(
        self,
        room: Room,
        engine: PoolEngine,
        policy: EvictionPolicy,
        observer: ResidencyObserver,
        clock: Callable[[], float],
        max_waiting: int,
        deadline_seconds: float,
    ) -> None:
        self.room = room
        self.resident: dict[str, ResidentPool] = {}
        self.pending: dict[str, PendingPool] = {}  # first come first
        self.pinned: set[str] = set()
        self.counts = Counts()
        self.idle = asyncio.Event()
        self._engine = engine
        self._policy = policy
        self._observer = observer
        self._clock = clock
        self._max_waiting = max_waiting
        self._deadline_seconds = deadline_seconds
        self._closing: set[str] = set()
        self._closing_for: PendingPool | None = None
        self._retired: OrderedDict[str, None] = OrderedDict()  # the oldest first
        self._tasks: dict[asyncio.Task[None], bool] = {}  # -> whether it copies
        self._last_load_seconds = 0.0

    # -- questions --

    @property
    def num_running(self) -> int:
        """Return the leases held, of all pools."""
        return sum(entry.leases for entry in self.resident.values())

    @property
    def num_waiting(self) -> int:
        """Return how many requests and operators wait."""
        return sum(len(pending.waiters) for pending in self.pending.values())

    def open_entry(self, pool: ExpertPool) -> ResidentPool | None:
        """Return the pool's entry if a lease on it can be had at once."""
        entry = self.resident.get(pool.content_hash)
        if entry is None or not entry.is_published or entry.is_retired or entry.drains:
            return None
        return None if pool.content_hash in self._closing else entry

    def check_integrity(self) -> None:
        """Assert that slots, rows, entries, leases and the queue agree."""
        self.room.check_integrity()
        assert self.room.slots.keys == self.resident.keys()
        for key, entry in self.resident.items():
            assert key == entry.pool.content_hash
            assert entry.row == self.room.row_of(key)
            assert entry.leases >= 0 and entry.drains >= 0
            assert entry.is_published or not (entry.leases or key in self.pinned)
            assert not (entry.is_retired and key in self.pinned)
        assert self.pinned <= self.resident.keys()
        assert self._closing <= self.resident.keys() - self.pinned
        assert self._closing_for is not None or not self._closing
        for key, pending in self.pending.items():
            assert key == pending.pool.content_hash
            assert pending.waiters, "a place in the queue that nobody holds"
            assert self.open_entry(pending.pool) is None, "somebody waits for an open pool"
        assert sum(self._tasks.values()) <= 1, "two loads at once"

    # -- waiting --

    async def acquire(self, pool: ExpertPool, purpose: Purpose) -> ResidentPool:
        """Return the pool's entry, resident, with what `purpose` asks for already done.

        Waits in the queue if need be. Raises as `check_may_wait`, LoadDeadlineExceeded, and
        whatever the load raised.
        """
        key = pool.content_hash
        self._policy.note_asked(key, self._clock())
        if purpose is Purpose.PIN and key in self.resident:
            self._closing.discard(key)
        if (entry := self.open_entry(pool)) is not None:
            self._grant(entry, purpose)
            self.schedule()  # a pin may leave too little for who waits
            return entry
        self.check_may_wait(pool)
        if (pending := self.pending.get(key)) is None:
            pending = self.pending[key] = PendingPool(pool, self.room.demand(pool))
        place: asyncio.Future[ResidentPool] = asyncio.get_running_loop().create_future()
        pending.waiters[place] = purpose
        start, outcome = self._clock(), "failed"
        deadline = asyncio.timeout(self._deadline_seconds)
        try:
            self.schedule()
            async with deadline:
                entry = await place
            outcome = "granted"
            return entry
        except TimeoutError:
            if not deadline.expired():  # the load raised it
                raise
            outcome = "deadline"
            raise self._too_late(pending) from None
        except asyncio.CancelledError:
            outcome = "left"
            raise
        finally:
            if outcome != "granted":
                self._leave(pending, place, purpose)
            self._observer.count_wait(pool.name, outcome, self._clock() - start)

    def _leave(
        self, pending: PendingPool, place: asyncio.Future[ResidentPool], purpose: Purpose
    ) -> None:
        """Give up a place in the queue, and the lease that may have come in the same moment."""
        is_granted = place.done() and not place.cancelled() and place.exception() is None
        if is_granted and purpose is Purpose.LEASE:
            self.release(place.result())
        pending.waiters.pop(place, None)
        if not pending.waiters and self.pending.get(pending.pool.content_hash) is pending:
            del self.pending[pending.pool.content_hash]
        self.schedule()

    def _let_in(self, pending: PendingPool, entry: ResidentPool) -> None:
        del self.pending[pending.pool.content_hash]
        for place, purpose in pending.waiters.items():
            if not place.done():
                self._grant(entry, purpose)
                place.set_result(entry)
        pending.waiters.clear()

    def _turn_away(self, pending: PendingPool, error: Exception) -> None:
        del self.pending[pending.pool.content_hash]
        for place in pending.waiters:
            if not place.done():
                place.set_exception(error)
        pending.waiters.clear()

    def _grant(self, entry: ResidentPool, purpose: Purpose) -> None:
        if purpose is Purpose.LEASE:
            entry.leases += 1
        elif purpose is Purpose.PIN and not entry.is_retired:
            self.pinned.add(entry.pool.content_hash)
            self._closing.discard(entry.pool.content_hash)
            stay = self.room.kept(self.resident.keys() - self.pinned)
            for pending in list(self.pending.values()):
                if not self.room.can_hold(stay | pending.demand):
                    self._turn_away(pending, self._blocked(pending.pool))

    def release(self, entry: ResidentPool) -> None:
        """End a lease."""
        entry.leases -= 1
        if not entry.leases:
            self.schedule()

    def retire(self, key: str) -> None:
        """Unpin a pool and have it go after its last lease; operators wait for it in vain.

        Requests that wait for it, or were admitted and have still to ask, are served first.
        """
        self.pinned.discard(key)
        self._retired[key] = None
        if len(self._retired) > _REMEMBERED_RETIRED:
            self._retired.popitem(last=False)
        if (entry := self.resident.get(key)) is not None:
            entry.is_retired = True
        if (pending := self.pending.get(key)) is not None:
            for place, purpose in pending.waiters.items():
                if purpose is not Purpose.LEASE and not place.done():
                    place.set_exception(
                        StateConflict(
                            f"pool {pending.pool.name!r} was redefined or removed before it was"
                            " loaded"
                        )
                    )
        self.schedule()

    def revive(self, key: str) -> None:
        """Have a pool stay that was retired: the same content is defined again."""
        if key not in self._retired:
            return
        del self._retired[key]
        if (entry := self.resident.get(key)) is not None:
            entry.is_retired = False
            self.schedule()

    # -- the queue --

    def schedule(self) -> None:
        """Do all that can be done now: evict, let in, start loads. Never awaits."""
        while self._evict_leaving() or self._serve_waiting():
            pass
        if not self.num_running and not self.num_waiting:
            self.idle.set()

    def _evict_leaving(self) -> bool:
        """Evict what is retired or drained and no lease holds; tell whether anything was."""
        leaving = [
            (key, entry)
            for key, entry in self.resident.items()
            if (entry.is_retired or entry.drains) and entry.is_published and not entry.leases
        ]
        for key, entry in leaving:
            self.room.evict(key)
            self._forget(key, "operator" if entry.drains else "retired")
        return bool(leaving)

    def _serve_waiting(self) -> bool:
        """Walk the queue once; True after a change that may let others in: walk it again."""
        if self._closing_for not in self.pending.values():
            self._reopen()
        for pending in self.pending.values():
            if (entry := self.open_entry(pending.pool)) is not None:
                self._let_in(pending, entry)
                return True
        # Others' pools are loading, or on their way out, or nobody wants them any more.
        waiting = [
            pending
            for key, pending in self.pending.items()
            if key not in self.resident and pending.is_wanted
        ]
        if not waiting:
            return False
        first, *others = waiting
        coldest_first = self._coldest_first()
        idle = [key for key in coldest_first if not self.resident[key].leases]
        victims = self.room.choose(first.demand, idle)
        if victims is not None and self._has_link(first):
            self._start(first, victims)
            return True
        if victims is None and self._close_for(first, coldest_first):
            return True
        reserved = self._closing.union(victims or ())
        idle = [key for key in idle if key not in reserved]
        return self._let_pass(first, others, reserved, idle)

    def _let_pass(
        self, first: PendingPool, others: list[PendingPool], reserved: set[str], idle: list[str]
    ) -> bool:
        """Start what can be started behind the first, if that is no loss to it.

        `reserved` is what goes for the first, `idle` what may go for the others.
        """
        at_least = first.demand | self.room.kept(reserved.union(idle))
        for pending in others:
            if not self._has_link(pending) or not self.room.can_hold(at_least | pending.demand):
                continue
            victims = self.room.choose(pending.demand, idle)
            both = first.demand | pending.demand
            if victims is not None and self.room.fits(both, without=reserved.union(victims)):
                self._start(pending, victims)
                return True
        return False

    def _has_link(self, pending: PendingPool) -> bool:
        """Tell whether the link is free, or not needed."""
        return not self._is_copying or self.room.slots.covers_bits(pending.demand.experts)

    def _close_for(self, pending: PendingPool, coldest_first: list[str]) -> bool:
        """Stop admission to the coldest pools whose going makes room; True if others open for it.

        What is closed already goes first, lest new leases on it outrun the choice. Pools that are
        still on their way go last; whoever waits for one is let in when it has come.
        """
        self._closing_for = pending
        coming = [key for key, entry in self.resident.items() if not entry.is_published]
        chosen = self.room.choose(pending.demand, coldest_first + coming)
        assert chosen is not None, "only pins could forbid it, and they would have refused it"
        closed, self._closing = self._closing, set(chosen)
        return not closed <= self._closing

    def _reopen(self) -> None:
        self._closing_for = None
        self._closing.clear()

    def _coldest_first(self) -> list[str]:
        """Return the pools that may be evicted, the first to go first.

        Those that are closed lead, then those whose going frees no slot: to bring one of these back
        costs no copy.
        """
        evictable = [
            key
            for key, entry in self.resident.items()
            if entry.is_published and key not in self.pinned
        ]
        coldest_first = self._policy.coldest_first(evictable, self._clock())
        redundant = self.room.slots.redundant(coldest_first)
        return sorted(
            coldest_first, key=lambda key: (key not in self._closing, key not in redundant)
        )

    # -- loads --

    @property
    def _is_copying(self) -> bool:
        return any(self._tasks.values())

    def _start(self, pending: PendingPool, victims: list[str]) -> None:
        """Evict the victims, take slots and a row, and set the pool's task going."""
        pool = pending.pool
        plan = self.room.plan(pool, victims)
        try:
            self._engine.check_readable(plan.copies)
        except Exception as error:  # whoever gave a lease back and came by here did not ask for it
            self._note_failure(pool, error)
            return
        if self._closing_for is pending:
            self._reopen()
        row = self.room.take(pool, plan)
        for victim in victims:
            self._forget(victim, "room")
        self.resident[plan.key] = entry = ResidentPool(
            pool, row, is_retired=plan.key in self._retired
        )
        task = asyncio.create_task(self._settle(entry, plan))
        self._tasks[task] = bool(plan.copies)
        task.add_done_callback(self._note_done)

    async def _settle(self, entry: ResidentPool, plan: LoadPlan) -> None:
        """Copy and publish, then let in who waits; a failure takes back slots, row and entry."""
        pool = entry.pool
        try:
            report = await self._engine.make_resident(
                entry.row, pool.expert_ids, pool.router_temperature, plan.copies
            )
        except (Exception, asyncio.CancelledError) as error:
            self.room.settle(plan.key, is_loaded=False)
            self._forget(plan.key, None)
            this_task = asyncio.current_task()
            if this_task is not None and this_task.cancelling():  # the event loop's end
                raise
            if isinstance(error, asyncio.CancelledError):
                error = EngineDead("the load was given up by the engine's client")
            self._note_failure(pool, error)
            return
        self.room.settle(plan.key, is_loaded=True)
        entry.is_published = True
        if plan.copies:
            self._note_load(pool, report)
        if (pending := self.pending.get(plan.key)) is not None:
            self._let_in(pending, entry)  # before anything else may pending it gone

    def _note_done(self, task: asyncio.Task[None]) -> None:
        """Go on with the queue when a load has ended, however it did."""
        del self._tasks[task]
        if task.cancelled():  # the event loop's end
            return
        if (error := task.exception()) is not None:
            logger.error("the end of a load went wrong", exc_info=error)
        self.schedule()

    def _forget(self, key: str, reason: str | None) -> None:
        """Drop the entry of a pool that has given back its slots and row."""
        entry = self.resident.pop(key)
        self._closing.discard(key)
        entry.gone.set()
        if reason is not None:
            self.counts.evictions += 1
            self._observer.count_eviction(entry.pool.name, reason)
            logger.info("evicted pool %s (%s)", entry.pool.name, reason)

    def _note_load(self, pool: ExpertPool, report: LoadReport) -> None:
        self.counts.loads += 1
        self._last_load_seconds = report.seconds
        logger.info(
            "loaded pool %s in %.3f s: %d of its %d experts copied, %d bytes read",
            *(pool.name, report.seconds, report.experts_copied, report.num_experts),
            report.bytes_read,
        )
        self._observer.count_load(pool.name, report)

    def _note_failure(self, pool: ExpertPool, error: Exception) -> None:
        """Turn away who waits for a pool that could not be loaded."""
        self.counts.failed_loads += 1
        logger.error("pool %s could not be loaded: %s", pool.name, error)
        self._observer.count_failed_load(pool.name)
        if (pending := self.pending.get(pool.content_hash)) is not None:
            self._turn_away(pending, error)

    # -- refusals --

    def check_may_wait(self, pool: ExpertPool) -> None:
        """Raise PoolTooLarge, PoolBlocked or TooManyWaiting unless a place may be had."""
        self.room.check_can_ever_fit(pool)
        if not self.room.fits(self.room.demand(pool), without=self.resident.keys() - self.pinned):
            raise self._blocked(pool)
        if self.num_waiting >= self._max_waiting:
            raise TooManyWaiting(
                f"the waiting queue is full: {self.num_waiting} requests wait for loads already"
                f" (--max-waiting {self._max_waiting}), and pool {pool.name!r} is not resident;"
                f" retry later, or raise --max-waiting",
                self._retry_after_seconds(),
            )

    def _blocked(self, pool: ExpertPool) -> PoolBlocked:
        names = sorted(self.resident[key].pool.name for key in self.pinned)
        unpinned = self.resident.keys() - self.pinned
        has_slots = self.room.slots.fits(pool.expert_ids, without=unpinned)
        what, flags = (
            ("rows", "--max-pools") if has_slots else ("slots", "--expert-memory or --expert-slots")
        )
        return PoolBlocked(
            f"pool {pool.name!r} cannot be loaded: the pinned pools ({', '.join(names)}) leave too"
            f" few {what} for it; unpin one, or raise {flags}",
            self._retry_after_seconds(),
        )

    def _too_late(self, pending: PendingPool) -> LoadDeadlineExceeded:
        busy = sum(self.resident[key].leases for key in self._closing)
        return LoadDeadlineExceeded(
            f"pool {pending.pool.name!r} was not loaded within {self._deadline_seconds:g} s"
            f" (pools in the waiting queue: {len(self.pending)}; requests still running in pools"
            f" that must go first: {busy}); retry later, raise --load-deadline, or give experts"
            " more room",
            self._retry_after_seconds(),
        )

    def _retry_after_seconds(self) -> int:
        """Estimate when the queue is served, from its length and the last load."""
        return max(1, math.ceil(self._last_load_seconds * (len(self.pending) + 1)))
