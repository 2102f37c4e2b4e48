"""The waiting queue: which pools close and pass, and what waiting requests are told."""

from __future__ import annotations

import asyncio

import pytest

from emo_serve.errors import (
    LoadDeadlineExceeded,
    PoolBlocked,
    PoolLoadFailed,
    TooManyWaiting,
)
from emo_serve.residency.manager import ResidencyManager
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import (
    AB,
    AC,
    BC,
    A,
    B,
    C,
    Client,
    D,
    a_manager,
    a_pool,
    in_virtual_time,
    loaded,
    now,
    state,
    states,
    status,
)


async def contended(engine: FakeEngine, **options: object) -> tuple[ResidencyManager, list[Client]]:
    """Return a manager whose room a and b fill, a request running in each; a is the colder."""
    manager = await loaded(engine, A, B, **options)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    assert all(client.is_running for client in clients)
    return manager, clients


# -- closing --


async def test_the_coldest_pool_closes_until_its_requests_have_ended() -> None:
    engine = FakeEngine(is_holding=True)
    manager, (in_a, in_b) = await contended(engine)
    in_c, late_a, late_b = Client(manager, C), Client(manager, A), Client(manager, B)
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "c": "waiting"}
    assert (late_a.is_running, late_b.is_running) == (False, True)
    assert engine.operations == []
    await in_a.finish()
    await settle()
    assert (state(manager, A), state(manager, C)) == ("waiting", "loading")
    (await engine.next_held()).release()
    await settle()
    assert in_c.is_running and not late_a.is_running
    assert engine.copied == [4, 5]
    for client in (in_b, late_b, in_c):
        await client.finish()
    (await engine.next_held()).release()  # a comes back
    await settle()
    await late_a.finish()
    manager.check_integrity()


async def test_an_idle_pool_goes_before_a_leased_one_closes() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    async with manager.lease(A), manager.lease(A):  # b is idle, though asked for later
        async with manager.lease(B):
            pass
        await manager.load(C)
        assert states(manager) == {"a": "resident", "c": "resident"}


async def test_only_as_many_close_as_must() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    in_c = Client(manager, a_pool("one", 4))
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "one": "waiting"}
    await in_c.leave()
    both = Client(manager, a_pool("three", 4, 5, 6))
    await settle()
    assert states(manager) == {"a": "closing", "b": "closing", "three": "waiting"}
    await both.leave()
    for client in clients:
        await client.finish()


async def test_what_is_closed_stays_the_choice_however_hot_it_becomes() -> None:
    manager, clients = await contended(FakeEngine(is_holding=True))
    in_c = Client(manager, C)
    await settle()
    more = [Client(manager, A) for _ in range(3)]
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "c": "waiting"}
    for client in (in_c, *more):
        await client.leave()
    for client in clients:
        await client.finish()


@pytest.mark.parametrize("how", ["leaves", "deadline"])
@in_virtual_time
async def test_closed_pools_open_again_when_the_first_in_the_queue_goes(how: str) -> None:
    manager, clients = await contended(FakeEngine(is_holding=True), load_deadline_seconds=60.0)
    in_c = Client(manager, C)
    await asyncio.sleep(30.0)
    late = Client(manager, A)
    await settle()
    assert not late.is_running
    if how == "leaves":
        await in_c.leave()
    else:
        await asyncio.sleep(30.5)
        with pytest.raises(LoadDeadlineExceeded):
            await in_c.task
    await settle()
    assert late.is_running
    assert states(manager) == {"a": "resident", "b": "resident"}
    for client in (*clients, late):
        await client.finish()
    manager.check_integrity()


async def test_a_closed_pool_opens_as_soon_as_the_first_finds_room_elsewhere() -> None:
    """And not only when that load is done: its requests would wait for nothing."""
    engine = FakeEngine(is_holding=True)
    manager, (in_a, in_b) = await contended(engine)
    in_c, late_a = Client(manager, C), Client(manager, A)
    await settle()
    assert state(manager, A) == "closing"
    await in_b.finish()
    await settle()
    assert states(manager) == {"a": "resident", "c": "loading"}
    assert late_a.is_running
    engine.held[0].release()
    await settle()
    for client in (in_a, late_a, in_c):
        await client.finish()


async def test_a_pool_on_its_way_is_closed_too_and_serves_its_waiters() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine, slots=2)
    first = Client(manager, A)
    await settle()
    second, late = Client(manager, B), Client(manager, A)
    await settle()
    (await engine.next_held()).release()
    await settle()
    assert first.is_running and late.is_running  # both waited for this load
    later = Client(manager, A)
    await settle()
    assert not later.is_running
    await first.finish()
    await late.finish()
    (await engine.next_held()).release()
    await settle()
    assert second.is_running
    await second.finish()
    (await engine.next_held()).release()
    await settle()
    await later.finish()
    manager.check_integrity()


# -- passing --


async def test_a_covered_pool_passes_while_a_load_copies() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B, slots=6)
    in_c, in_union = Client(manager, C), Client(manager, AB)
    await settle()
    copying, publishing = engine.held
    assert (copying.expert_ids, publishing.copies) == (C.expert_ids, ())
    publishing.release()
    await settle()
    assert in_union.is_running and not in_c.is_running
    copying.release()
    await settle()
    await in_c.finish()
    await in_union.finish()


async def test_a_covered_pool_passes_while_the_first_waits_for_a_load_to_end() -> None:
    """D needs what is still being loaded to go; pinned a, at another temperature, costs nothing."""
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    await manager.load(A, pin=True)
    in_c, in_d = Client(manager, C), Client(manager, D)
    hot = Client(manager, a_pool("hot", 0, 1, temperature=2.0))
    await settle()
    assert (state(manager, C), state(manager, D)) == ("loading", "waiting")
    engine.held[-1].release()
    await settle()
    assert hot.is_running
    (await engine.next_held()).release()
    await settle()
    assert in_c.is_running and state(manager, C) == "closing"
    await in_c.finish()
    (await engine.next_held()).release()
    await settle()
    await in_d.finish()
    await hot.finish()
    manager.check_integrity()


async def test_no_pool_passes_that_would_take_what_the_first_waits_for() -> None:
    """The union is resident, but it would hold a's slots when a has gone."""
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    in_c, in_union = Client(manager, C), Client(manager, AB)
    await settle()
    assert states(manager) == {
        "a": "closing",
        "b": "resident",
        "c": "waiting",
        "a+b": "waiting",
    }
    assert engine.operations == []
    await in_union.leave()
    await in_c.leave()
    for client in clients:
        await client.finish()


async def test_the_second_in_the_queue_starts_first_if_there_is_room_for_both() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, slots=5)
    in_a = Client(manager, A)
    await settle()
    big, small = Client(manager, a_pool("big", 2, 3, 4, 5)), Client(manager, a_pool("small", 7))
    await settle()  # big and small fit beside each other, not beside a
    assert states(manager) == {"a": "closing", "big": "waiting", "small": "loading"}
    (await engine.next_held()).release()
    await settle()
    assert small.is_running
    await in_a.finish()
    (await engine.next_held()).release()
    await settle()
    assert big.is_running and small.is_running
    await big.finish()
    await small.finish()


async def test_the_second_in_the_queue_waits_if_it_would_need_the_firsts_room() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, slots=5)
    in_a = Client(manager, A)
    await settle()
    big = Client(manager, a_pool("big", 2, 3, 4, 5))
    other = Client(manager, a_pool("other", 6, 7))  # fits beside a, not beside big
    await settle()
    assert engine.operations == []
    await in_a.finish()
    (await engine.next_held()).release()
    await settle()
    assert big.is_running and not other.is_running
    await big.finish()
    (await engine.next_held()).release()
    await settle()
    await other.finish()


async def test_free_slots_that_the_first_will_take_are_not_free_for_others() -> None:
    """Five slots: the last pool would fit now, but not beside the first and what stays."""
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, a_pool("idle", 2), slots=5)
    in_a = Client(manager, A)
    await settle()
    first, last = Client(manager, a_pool("first", 3, 4, 5, 6)), Client(manager, a_pool("last", 7))
    await settle()
    assert states(manager) == {
        "a": "closing",
        "idle": "resident",
        "first": "waiting",
        "last": "waiting",
    }
    assert engine.operations == []
    await in_a.finish()
    (await engine.next_held()).release()
    await settle()
    assert first.is_running
    (await engine.next_held()).release()  # now in the place of the idle one
    await settle()
    assert states(manager) == {"first": "resident", "last": "resident"}
    await first.finish()
    await last.finish()


async def test_a_covered_pool_passes_one_that_waits_for_the_link_alone() -> None:
    """D will go in the place of idle a, once c is loaded; b at another temperature is no loss."""
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B, slots=6)
    in_c, in_d = Client(manager, C), Client(manager, D)
    hot = Client(manager, a_pool("hot", 2, 3, temperature=2.0))
    hotter = Client(manager, a_pool("hotter", 0, 1, temperature=3.0))  # would hold a's slots
    await settle()
    assert states(manager) == {
        "a": "resident",
        "b": "resident",
        "c": "loading",
        "d": "waiting",
        "hot": "loading",
        "hotter": "waiting",
    }
    engine.held[-1].release()
    await settle()
    assert hot.is_running
    await hotter.leave()
    for client in (in_c, in_d):
        engine.held[0].release()
        await settle()
        assert client.is_running
    for client in (in_c, in_d, hot):
        await client.finish()
    manager.check_integrity()


async def test_requests_that_wait_for_rows_are_served_in_turn_too() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, slots=8, rows=3)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    in_union, late_b = Client(manager, AB), Client(manager, B)
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "a+b": "waiting"}
    await clients[0].finish()
    await settle()
    assert in_union.is_running and engine.copied == []
    for client in (clients[1], in_union, late_b):
        await client.finish()


# -- the bounds of waiting --


async def test_the_queue_is_bounded_over_all_pools() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, max_waiting=2)
    waiting = [Client(manager, B), Client(manager, C)]
    await settle()
    with pytest.raises(TooManyWaiting, match="2 requests wait .* --max-waiting") as caught:
        manager.check_admissible(B)
    assert caught.value.retry_after_seconds >= 1
    with pytest.raises(TooManyWaiting):
        async with manager.lease(C):
            pass
    manager.check_admissible(A)  # needs no wait
    async with manager.lease(A):
        pass
    await waiting[0].leave()
    manager.check_admissible(B)
    await waiting[1].leave()
    engine.held[0].release()
    await settle()
    manager.check_integrity()


@in_virtual_time
async def test_a_place_is_held_until_the_deadline_and_leaves_nothing_behind() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine, load_deadline_seconds=20.0)
    first, start = Client(manager, C), now()
    await asyncio.sleep(5.0)
    second = Client(manager, C)
    with pytest.raises(LoadDeadlineExceeded, match="'c' was not loaded within 20 s") as caught:
        await first.task
    assert now() - start == 20.0
    assert "requests still running in pools that must go first: 1" in str(caught.value)
    assert state(manager, A) == "closing"  # the second still wants it
    with pytest.raises(LoadDeadlineExceeded):
        await second.task
    assert now() - start == 25.0
    assert states(manager) == {"a": "resident", "b": "resident"}
    assert engine.operations == []
    for client in clients:
        await client.finish()
    stats = manager.statistics()
    assert (stats.waiting_requests, stats.evictions) == (0, 0)
    manager.check_integrity()


@in_virtual_time
async def test_a_load_goes_on_after_the_deadline_of_its_request() -> None:
    manager = a_manager(FakeEngine(load_seconds=50.0), load_deadline_seconds=30.0)
    with pytest.raises(LoadDeadlineExceeded):
        await manager.load(A)
    async with manager.lease(A):
        assert now() == 50.0


# -- leaving --


async def test_a_client_that_leaves_does_not_stop_the_load() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    leaver, stayer = Client(manager, A), Client(manager, A)
    load = await engine.next_held()
    await leaver.leave()
    load.release()
    await settle()
    assert stayer.is_running
    await stayer.finish()
    manager.check_integrity()


async def test_a_load_that_every_client_left_ends_and_keeps_the_pool() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    leaver = Client(manager, A)
    load = await engine.next_held()
    await leaver.leave()
    assert state(manager, A) == "loading"
    load.release()
    await settle()
    assert state(manager, A) == "resident"
    async with manager.lease(A) as lease:
        assert lease.is_hit


async def test_no_pool_is_evicted_for_a_place_that_left() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    in_c = Client(manager, C)
    await settle()
    await in_c.leave()
    for client in clients:
        await client.finish()
    assert states(manager) == {"a": "resident", "b": "resident"}
    assert engine.operations == []


async def test_no_pool_is_evicted_for_a_place_that_is_just_being_left() -> None:
    """The client is cancelled, but its task has not run yet when the room is there."""
    engine = FakeEngine(is_holding=True)
    manager, (in_a, in_b) = await contended(engine)
    in_c = Client(manager, C)
    await settle()
    in_a.task.cancel()  # gives its lease back before in_c comes round to leaving
    in_c.task.cancel()
    await settle()
    assert states(manager) == {"a": "resident", "b": "resident"}
    assert engine.operations == []
    await in_b.finish()
    manager.check_integrity()


@pytest.mark.parametrize("is_cancelled_first", [True, False])
async def test_a_client_cancelled_in_the_moment_of_its_lease_gives_it_back(
    is_cancelled_first: bool,
) -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine, slots=2)
    client, next_in_queue = Client(manager, A), Client(manager, B)
    load = await engine.next_held()
    if is_cancelled_first:
        client.task.cancel()
        load.release()
    else:
        load.release()
        while not manager.statistics().running_requests:
            await asyncio.sleep(0)
        assert not client.is_running  # granted, but its task has not run since
        client.task.cancel()
    await settle()
    assert client.task.cancelled()
    manager.check_integrity()
    assert manager.statistics().running_requests == 0
    (await engine.next_held()).release()  # the next in the queue is served at once
    await settle()
    assert next_in_queue.is_running
    await next_in_queue.finish()


@in_virtual_time
async def test_a_lease_that_comes_in_the_moment_of_the_deadline_is_given_back_or_used() -> None:
    """The load ends exactly at the deadline; whichever comes first, no lease is lost."""
    outcomes = set()
    for load_seconds in (9.999, 10.0, 10.001):
        engine = FakeEngine(load_seconds=load_seconds)
        manager = a_manager(engine, load_deadline_seconds=10.0)
        try:
            async with manager.lease(A):
                outcomes.add("served")
        except LoadDeadlineExceeded:
            outcomes.add("late")
        await asyncio.sleep(1.0)
        assert manager.statistics().running_requests == 0
        assert manager.statistics().waiting_requests == 0
        assert state(manager, A) == "resident"
        manager.check_integrity()
    assert outcomes == {"served", "late"}


@in_virtual_time
async def test_a_lease_granted_just_before_the_deadline_strikes_is_given_back() -> None:
    """Both happen in one pass of the event loop, before the client's task has run."""
    manager = await loaded(FakeEngine(), A, load_deadline_seconds=10.0)
    await manager.load(B, pin=True)
    running, first, late = Client(manager, A), Client(manager, C), Client(manager, A)
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "c": "waiting"}
    granted: list[int] = []

    def unpin() -> None:  # b goes in the place of a, which opens
        manager.unpin(B)
        granted.append(manager.statistics().running_requests)

    asyncio.get_running_loop().call_at(10.0 - 1e-12, unpin)
    with pytest.raises(LoadDeadlineExceeded):
        await late.task
    assert granted == [2]
    assert manager.statistics().running_requests == 1
    await running.finish()
    with pytest.raises(LoadDeadlineExceeded):
        await first.task
    manager.check_integrity()
    assert manager.statistics().running_requests == 0


# -- blocked --


async def test_pinned_pools_block_at_once() -> None:
    engine = FakeEngine()
    manager = a_manager(engine)
    await manager.load(A, pin=True)
    await manager.load(B)
    with pytest.raises(PoolBlocked, match=r"pinned pools \(a\) leave too few slots") as caught:
        manager.check_admissible(BC)
    assert caught.value.retry_after_seconds >= 1
    with pytest.raises(PoolBlocked):
        async with manager.lease(BC):
            pass
    assert states(manager) == {"a": "resident", "b": "resident"}
    await manager.load(C)  # b may go
    manager.unpin(A)
    await manager.load(BC)


async def test_pinned_pools_block_by_rows_too() -> None:
    manager = a_manager(FakeEngine(), slots=8, rows=2)
    await manager.load(A, pin=True)
    with pytest.raises(PoolBlocked, match="too few rows .* --max-pools"):
        manager.check_admissible(B)
    manager.check_admissible(A)
    with pytest.raises(PoolBlocked, match="too few slots"):
        a_manager_full = a_manager(FakeEngine(), slots=2)
        await a_manager_full.load(A, pin=True)
        a_manager_full.check_admissible(B)


async def test_a_pin_turns_away_requests_that_wait_already_wherever_in_the_queue() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    first, second, third = Client(manager, C), Client(manager, AC), Client(manager, D)
    await settle()
    await manager.load(B, pin=True)
    await settle()
    assert isinstance(second.task.exception(), PoolBlocked)  # in the queue behind the first
    assert not first.task.done() and not third.task.done()
    await manager.load(A, pin=True)
    for client in (first, third):
        with pytest.raises(PoolBlocked):
            await client.task
    assert states(manager) == {"a": "resident", "b": "resident"}
    for client in clients:
        await client.finish()
    manager.check_integrity()


async def test_a_pin_that_was_waited_for_turns_away_those_behind_it() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine, slots=2)
    pin = asyncio.create_task(manager.load(A, pin=True))
    load = await engine.next_held()
    behind = Client(manager, B)
    await settle()
    load.release()
    await pin
    with pytest.raises(PoolBlocked):
        await behind.task
    assert manager.is_pinned(A)
    manager.check_integrity()


# -- failures in the queue --


async def test_the_queue_goes_on_after_a_failed_load() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    engine.unreadable = {(0, 4)}
    in_c, in_d = Client(manager, C), Client(manager, D)
    await settle()
    await clients[0].finish()  # c could start now, and cannot be read
    with pytest.raises(PoolLoadFailed):
        await in_c.task
    (await engine.next_held()).release()
    await settle()
    assert in_d.is_running
    assert states(manager) == {"b": "resident", "d": "resident"}
    await clients[1].finish()
    await in_d.finish()


async def test_waiting_requests_are_shown_with_their_pool() -> None:
    engine = FakeEngine(is_holding=True)
    manager, clients = await contended(engine)
    waiting = [Client(manager, C), Client(manager, C), Client(manager, A)]
    await settle()
    entry, of_a = status(manager, C), status(manager, A)
    assert entry is not None and of_a is not None
    assert (entry.row, entry.state, entry.waiting_requests) == (None, "waiting", 2)
    assert (of_a.state, of_a.running_requests, of_a.waiting_requests) == ("closing", 1, 1)
    assert manager.statistics().waiting_requests == 3
    for client in waiting:
        await client.leave()
    for client in clients:
        await client.finish()
