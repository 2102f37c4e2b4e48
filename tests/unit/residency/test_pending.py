"""Places in the queue: one per pool, in order of arrival, and gone with the last waiter."""

from __future__ import annotations

import pytest

from emo_serve.errors import PoolLoadFailed, StateConflict
from emo_serve.residency.pending import PendingPools
from emo_serve.residency.records import Ask, Purpose, ResidentPool
from emo_serve.residency.room import Room
from emo_serve.residency.slots import SlotTable
from tests.support.fake_engine import SLOT_BYTES
from tests.support.residency_world import NUM_EXPERTS, A, B, C, a_pool


@pytest.fixture
def pending() -> PendingPools:
    return PendingPools(Room(SlotTable((NUM_EXPERTS, 0), 4), 9, SLOT_BYTES))


async def test_waiters_share_the_place_of_the_first(pending: PendingPools) -> None:
    for pool in (B, A, a_pool("also-b", 2, 3), C):
        pending.join(pool, Purpose.LEASE)
    assert [place.pool.name for place in pending] == ["b", "a", "c"]
    assert (len(pending), pending.num_waiters) == (3, 4)
    place = pending.get(B.content_hash)
    assert place is not None and (len(place.waiters), place.demand.rows) == (2, 1)
    pending.check_integrity()


async def test_a_place_is_gone_with_its_last_waiter(pending: PendingPools) -> None:
    first, second = (pending.join(A, Purpose.LEASE) for _ in range(2))
    pending.leave(A.content_hash, first)
    pending.leave(A.content_hash, first)  # a no-op
    assert pending.num_waiters == 1
    pending.leave(A.content_hash, second)
    assert len(pending) == 0 and pending.get(A.content_hash) is None
    pending.leave(A.content_hash, second)


async def test_a_waiter_that_was_served_does_not_leave_a_later_place(pending: PendingPools) -> None:
    """Its task runs a moment after its place was removed; by then others may wait again."""
    served = pending.join(A, Purpose.LEASE)
    place = pending.get(A.content_hash)
    assert place is not None
    assert pending.remove(place) == [(served, Ask(Purpose.LEASE, "a"))]
    pending.join(A, Purpose.PIN)
    pending.leave(A.content_hash, served)
    assert pending.num_waiters == 1


async def test_a_cancelled_waiter_keeps_its_place_but_is_not_served(pending: PendingPools) -> None:
    cancelled, waiting = (pending.join(A, purpose) for purpose in (Purpose.LEASE, Purpose.LOAD))
    place = pending.get(A.content_hash)
    assert place is not None
    cancelled.cancel()
    assert place.is_wanted and pending.num_waiters == 2
    waiting.set_result(ResidentPool(A, row=1))
    assert not place.is_wanted
    assert pending.remove(place) == []


async def test_turning_away_tells_every_waiter(pending: PendingPools) -> None:
    waiters = [pending.join(A, purpose) for purpose in Purpose]
    others = pending.join(B, Purpose.LEASE)
    place = pending.get(A.content_hash)
    assert place is not None
    pending.turn_away(place, PoolLoadFailed("gone"))
    assert all(isinstance(waiter.exception(), PoolLoadFailed) for waiter in waiters)
    assert not others.done() and len(pending) == 1


async def test_only_operators_are_told_of_a_retired_pool(pending: PendingPools) -> None:
    lease, *others = (pending.join(A, purpose) for purpose in Purpose)
    pending.turn_away_operators(A.content_hash)
    pending.turn_away_operators(B.content_hash)  # no one waits for it: a no-op
    assert not lease.done()
    for waiter in others:
        assert isinstance(waiter.exception(), StateConflict)
    assert pending.num_waiters == 3  # growth is no client; the operators leave when their tasks run
