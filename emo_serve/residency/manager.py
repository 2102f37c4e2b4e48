"""Expert pools under a slot budget. Loads run beside decoding; only a lease keeps a pool in place.

This module alone decides, in the front-end process, which experts sit where. A request takes a
lease: at once if its pool is resident, else after a wait in the queue (see `queue`), and no other
request waits with it. Operators load, pin, evict and retire pools through the same queue. Giving a
lease back never awaits.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from emo_serve.errors import Draining, PoolInUse
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.backlog import Backlog, BacklogLimits, Place
from emo_serve.residency.elastic import Growth, Nested, NestedSizes
from emo_serve.residency.policy import EvictionPolicy, LruPolicy
from emo_serve.residency.ports import NullObserver, PoolEngine, ResidencyObserver
from emo_serve.residency.queue import LoadQueue
from emo_serve.residency.records import PendingPool, Purpose, ResidentPool
from emo_serve.residency.resident import ResidentPools
from emo_serve.residency.room import Room
from emo_serve.residency.slots import LayerMap, SlotTable
from emo_serve.residency.statistics import (
    EventCounts,
    PoolResidency,
    PoolState,
    ResidencyStats,
)

__all__ = ["Lease", "ResidencyManager"]


@dataclass(frozen=True)
class Lease:
    """A running request's hold on a pool: until it ends, row and slots stay what they are.

    `is_hit` tells that it needed neither a copy nor a wait in the queue, `is_streamed` that its
    pool has no slots.
    """

    row: int
    pool: ExpertPool
    is_hit: bool = True
    is_streamed: bool = False


class ResidencyManager:
    """Grant leases on pools, and make those pools resident.

    `num_rows` counts the rows of the engine's pool table, including the base pool's; `slot_bytes`
    is the size of one expert in one layer, over all ranks. Pools must be complete and match the
    model. Without `limits`, any number of requests is admitted for resident pools. `shrink_to`
    names the sizes that a pool may leave behind when it makes room for another; without it, none.
    With `may_stream`, the engine serves pools that are too large for the slots, too.
    """

    def __init__(
        self,
        slots: SlotTable,
        num_rows: int,
        engine: PoolEngine,
        *,
        slot_bytes: int,
        policy: EvictionPolicy | None = None,
        max_waiting: int = 256,
        limits: BacklogLimits | None = None,
        load_deadline_seconds: float = 60.0,
        observer: ResidencyObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        shrink_to: NestedSizes | None = None,
        may_stream: bool = False,
    ) -> None:
        self._room = Room(slots, num_rows, slot_bytes, may_stream=may_stream)
        self._engine = engine
        self._policy: EvictionPolicy = policy or LruPolicy()
        self._counts = EventCounts(observer or NullObserver())
        self._deadline_seconds, self._clock = load_deadline_seconds, clock
        self._resident = ResidentPools(self._room, self._counts)
        self._queue = LoadQueue(
            self._room,
            self._resident,
            engine,
            self._policy,
            self._counts,
            clock,
            max_waiting,
            load_deadline_seconds,
            shrink_to,
        )
        self._growth = Growth(lambda pool: self._queue.acquire(pool, Purpose.GROW))
        self._backlog = Backlog(limits, clock)
        self._is_draining = False

    # -- questions --

    def is_resident(self, pool: ExpertPool) -> bool:
        """Tell whether all the pool's experts are in slots to stay, whichever pool loaded them."""
        return self._room.covers(pool) and not self._room.is_streamed(pool)

    def is_streamed(self, pool: ExpertPool) -> bool:
        """Tell whether the pool is too large for the slots, and served all the same, slowly."""
        return self._room.is_streamed(pool)

    def is_pinned(self, pool: ExpertPool) -> bool:
        """Tell whether an operator wants the pool to stay resident."""
        return self._resident.is_pinned(pool.content_hash)

    def fits_now(self, pool: ExpertPool) -> bool:
        """Tell whether the pool is resident, or could be loaded without evicting anything."""
        return pool.content_hash in self._resident or self._room.fits(self._room.demand(pool))

    def would_hit(self, pool: ExpertPool) -> bool:
        """Tell whether a lease would need neither a copy nor a wait in the queue."""
        if (resident := self._resident.get(pool.content_hash)) is not None:
            return resident.is_open
        return self._room.covers(pool)

    def num_fitting(self, pools: Iterable[ExpertPool]) -> int:
        """Return how many of these pools, taken in turn, could be loaded with no eviction.

        Pools that have room already are not counted.
        """
        return self._room.num_fitting(pools)

    def check_admissible(self, pool: ExpertPool) -> None:
        """Raise the error with which a new request for the pool must be refused, before it waits.

        Draining; PoolTooLarge if the slab could never hold the pool, PoolBlocked if the pool does
        not fit beside the pinned ones, TooManyWaiting if the request would have to wait and the
        queue is full. Asking changes nothing: to admit a request for a pool that may have been
        retired, call `revive` first.
        """
        if self._is_draining:
            raise Draining("the server is shutting down and takes no new requests")
        if self._resident.get_open(pool.content_hash) is None:
            self._queue.check_may_wait(pool)

    def may_ever_serve(self, pool: ExpertPool) -> bool:
        """Tell whether the pool is open, or would fit beside the pinned ones."""
        if self._resident.get_open(pool.content_hash) is not None:
            return True
        return self._room.fits(self._room.demand(pool), without=self._resident.unpinned)

    def check_servable(self, pool: ExpertPool, *, pinned: bool = False) -> None:
        """Raise PoolTooLarge for a pool that not even the empty slab could serve, or hold."""
        if pinned or not self._room.is_streamed(pool):
            self._room.check_can_ever_fit(pool)

    @property
    def limits(self) -> BacklogLimits | None:
        """Return the bound on admitted sequences; None if there is none."""
        return self._backlog.limits

    # -- leases --

    def enter(
        self, pool: ExpertPool, num_sequences: int = 1, *, is_continued: bool = False
    ) -> Place:
        """Count a request that was found admissible, from now until its place is released.

        Raises TooManyQueued if too many sequences are admitted, unless the request is the next step
        of one that was admitted before.
        """
        return self._backlog.enter(pool, num_sequences, is_continued=is_continued)

    def begin(self, nested: Nested) -> ExpertPool:
        """Return what a request for an elastic pool is served in, and have the rest follow.

        The whole pool if a lease on it can be had at once, or when its load ends; else the largest
        size that can; else the smallest, for which the request waits. The pool then grows behind
        what requests wait for, step by step.
        """
        whole = nested.whole
        if self._is_draining or self.would_hit(whole):
            return whole
        size = nested.largest(self._room.covers)
        if size is not None and not self._queue.may_begin(nested.at(size)):
            size = None
        resident = self._resident.get(whole.content_hash)
        if size is None and resident is not None and not resident.is_published:
            return whole
        self._policy.note_asked(whole.content_hash, self._clock())
        self._counts.count_smaller(whole.name)
        self._growth.start(nested, size)
        return nested.smallest if size is None else nested.at(size)

    @asynccontextmanager
    async def lease(self, pool: ExpertPool, *, is_own: bool = False) -> AsyncIterator[Lease]:
        """Wait until a pool is resident, and hold its row and slots until exit; exit never awaits.

        A request of the server's own is no client's: it is not counted as a hit, a miss or a wait,
        and clients' requests are not expected to last as long.

        Raises as `check_admissible` does, except Draining: a request admitted before is served to
        its end, even if that takes several leases (beam search). Also raises LoadDeadlineExceeded
        and whatever a load raised, for a streamed pool also if an expert of it cannot be read now:
        in the middle of a step it would be too late.
        """
        is_streamed = self._room.is_streamed(pool)
        if is_streamed:
            self._engine.check_readable(self._room.streamed_copies(pool))
        is_hit = self.would_hit(pool)
        if not is_own:
            self._counts.count_ask(pool.name, is_hit=is_hit)
        resident = await self._queue.acquire(pool, Purpose.LEASE, is_counted=not is_own)
        times, is_finished = self._queue.times, False
        number = times.begin(resident.key)
        try:
            yield Lease(resident.row, pool, is_hit, is_streamed)
            is_finished = not is_own
        finally:
            times.end(resident.key, number, is_finished=is_finished)
            self._queue.release(resident, pool.name)

    # -- operators --

    async def load(self, pool: ExpertPool, *, pin: bool = False) -> None:
        """Make a pool resident; a no-op if it is. With `pin`, have it stay.

        Waits in the same queue as requests and raises the same errors; a pool that is streamed can
        not be pinned. Cancelling the caller does not stop a load that has begun.
        """
        if pin:
            self.check_servable(pool, pinned=True)
        await self._queue.acquire(pool, Purpose.PIN if pin else Purpose.LOAD)

    def unpin(self, pool: ExpertPool) -> None:
        """Let the pool be evicted like any other; a no-op if it is not pinned."""
        self._queue.unpin(pool.content_hash)

    async def evict(self, *pools: ExpertPool, drain: bool = False) -> None:
        """Free the slots that only these pools need, and their rows; a no-op for one without any.

        A retired pool leaves by itself, and is not waited for. Raises PoolInUse, before any pool is
        evicted, if one is pinned, loading or leased. With `drain`, a leased pool admits no new
        requests and is evicted when its running ones have ended; if that takes longer than the load
        deadline, the pool stays and PoolInUse is raised. An elastic pool then grows only when it is
        asked for again.
        """
        going: dict[ResidentPool, ExpertPool] = {}
        for pool in pools:
            self._growth.stop(pool.content_hash)
            resident = self._resident.get(pool.content_hash)
            if resident is not None and not resident.is_retired:
                self._check_evictable(pool, resident, drain=drain)
                going.setdefault(resident, pool)
        with ExitStack() as stack:
            for resident in going:
                stack.enter_context(self._queue.draining(resident))
            try:
                async with asyncio.timeout(self._deadline_seconds):
                    for resident in going:
                        await resident.gone.wait()
            except TimeoutError:
                for resident, pool in going.items():
                    if not resident.gone.is_set():
                        raise PoolInUse(
                            f"pool {pool.name!r} still has {resident.leases} running requests"
                            f" after {self._deadline_seconds:g} s; it takes requests again"
                        ) from None

    def _check_evictable(self, pool: ExpertPool, resident: ResidentPool, *, drain: bool) -> None:
        if self.is_pinned(pool):
            raise PoolInUse(f"pool {pool.name!r} is pinned; unpin it first")
        if not resident.is_published:
            raise PoolInUse(f"pool {pool.name!r} is being loaded; evict it when it is resident")
        if resident.leases and not drain:
            raise PoolInUse(
                f"pool {pool.name!r} has {resident.leases} running requests; wait for them, or"
                " evict with drain=true, which admits no new ones until these have ended"
            )

    def retire(self, pool: ExpertPool) -> None:
        """Forget a pool whose definition is gone: unpin it, and evict it once no lease holds it.

        Requests that wait for it are served first; waiting operators get StateConflict.
        """
        self._policy.forget(pool.content_hash)
        self._growth.stop(pool.content_hash)
        self._queue.retire(pool.content_hash)

    def revive(self, pool: ExpertPool) -> None:
        """Let a retired pool stay, because its content is defined again; a no-op for other pools.

        Do not call it for requests admitted before the pool was retired: these are served anyway,
        and then the pool goes.
        """
        self._queue.revive(pool.content_hash)

    def cool(self, pool: ExpertPool) -> None:
        """Let a pool be evicted before others, as if no request had ever asked for it."""
        self._policy.forget(pool.content_hash)

    # -- shutdown --

    def start_draining(self) -> None:
        """Have `check_admissible` refuse everything; running and waiting requests go on."""
        self._is_draining = True
        self._growth.stop_all()

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait until no lease is held or waited for; return False if that takes too long."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._queue.wait_until_idle()
        except TimeoutError:
            return False
        return True

    # -- accounts --

    def statistics(self) -> ResidencyStats:
        """Return a snapshot of all pools that have room or are waited for."""
        slots = self._room.slots
        pending = {one.key: one for one in self._queue.pending}
        held = [self._status(one, pending.pop(one.key, None)) for one in self._resident]
        awaited = [self._status(None, one) for one in pending.values()]
        leased = [resident.key for resident in self._resident if resident.leases]
        return ResidencyStats(
            layers=slots.usage(),
            pools=(*held, *awaited),
            num_rows=self._room.num_rows,
            free_rows=self._room.num_free_rows,
            running_requests=self._resident.num_leases,
            waiting_requests=self._queue.num_waiting,
            slot_bytes=self._room.slot_bytes,
            leased_slots=slots.slots_of(leased),
            is_draining=self._is_draining,
            hits=self._counts.hits,
            misses=self._counts.misses,
            loads=self._counts.loads,
            failed_loads=self._counts.failed_loads,
            evictions=self._counts.evictions,
        )

    @property
    def pools(self) -> tuple[ExpertPool, ...]:
        """Return the pools that have room or are waited for."""
        known = {one.key: one.pool for one in (*self._queue.pending, *self._resident)}
        return tuple(known.values())

    @property
    def slot_bytes(self) -> int:
        """Return the size of one expert in one layer, over all ranks."""
        return self._room.slot_bytes

    @property
    def slots_version(self) -> int:
        """Return a number that grows whenever a slot changes, or who refers to it."""
        return self._room.slots.version

    def slot_maps(self) -> tuple[tuple[ExpertPool, ...], tuple[LayerMap, ...]]:
        """Return the pools that hold slots, and every layer's slots with places among them."""
        pools = tuple(resident.pool for resident in self._resident)
        return pools, self._room.slots.layer_maps([pool.content_hash for pool in pools])

    def check_integrity(self) -> None:
        """Assert that slots, rows, leases and the queue agree."""
        self._backlog.check_integrity()
        self._queue.check_integrity()

    def _status(self, resident: ResidentPool | None, pending: PendingPool | None) -> PoolResidency:
        """Describe a pool that has room, is waited for, or both; at least one must be given."""
        known = resident or pending
        assert known is not None
        state: PoolState = "waiting"
        if resident is not None:
            state = "closing" if resident.is_published else "loading"
            if resident.is_open:
                state = "streamed" if self._room.is_streamed(resident.pool) else "resident"
        return PoolResidency(
            name=known.pool.name,
            content_hash=known.key,
            row=resident.row if resident is not None and resident.is_published else None,
            state=state,
            is_pinned=self._resident.is_pinned(known.key),
            running_by_name=Counter(resident.leases_by_name if resident is not None else ()),
            waiting_by_name=Counter(
                ask.name
                for ask in (pending.waiters.values() if pending is not None else ())
                if ask.purpose is not Purpose.GROW
            ),
        )
