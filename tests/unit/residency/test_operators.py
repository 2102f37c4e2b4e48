"""What operators may do to pools: load, pin, unpin, evict, drain and retire, in every state."""

from __future__ import annotations

import asyncio

import pytest

from emo_serve.errors import PoolBlocked, PoolInUse, StateConflict, TooManyWaiting
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import (
    AB,
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
)

# -- load and pin --


async def test_a_pinned_pool_stays_and_an_unpinned_one_may_go() -> None:
    manager = a_manager(FakeEngine())
    await manager.load(A, pin=True)
    await manager.load(A)  # asking for it again changes nothing
    assert manager.is_pinned(A) and not manager.is_pinned(B)
    for pool in (B, C, D, B):
        await manager.load(pool)
        assert state(manager, A) == "resident"
    manager.unpin(A)
    manager.unpin(A)
    async with manager.lease(B):
        await manager.load(C)
    assert states(manager).keys() == {"b", "c"}
    manager.check_integrity()


async def test_unpinning_lets_in_requests_that_wait_for_that_room() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    in_b = Client(manager, B)
    await settle()
    await manager.load(A, pin=True)
    in_c = Client(manager, C)
    await settle()
    assert states(manager) == {"a": "resident", "b": "closing", "c": "waiting"}
    manager.unpin(A)
    await settle()
    assert in_c.is_running
    assert states(manager) == {"b": "resident", "c": "resident"}
    await in_b.finish()
    await in_c.finish()


async def test_a_pin_on_a_closing_pool_opens_it_and_another_closes() -> None:
    manager = await loaded(FakeEngine(), A, B)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    in_c = Client(manager, C)
    await settle()
    assert states(manager) == {"a": "closing", "b": "resident", "c": "waiting"}
    late = Client(manager, A)
    await settle()
    await manager.load(A, pin=True)  # at once
    await settle()
    assert late.is_running
    assert states(manager) == {"a": "resident", "b": "closing", "c": "waiting"}
    manager.check_integrity()
    await clients[1].finish()
    await settle()
    assert in_c.is_running
    for client in (clients[0], late, in_c):
        await client.finish()


async def test_a_pin_that_changes_the_choice_opens_what_need_not_go_any_more() -> None:
    """Small and b would have gone; now that small is pinned, large must, and b need not."""
    small, b, large = a_pool("small", 0), a_pool("b", 1), a_pool("large", 2, 3)
    manager = await loaded(FakeEngine(), small, b, large)
    clients = [Client(manager, pool) for pool in (small, b, large)]
    await settle()
    in_new, late = Client(manager, a_pool("new", 6, 7)), Client(manager, b)
    await settle()
    assert (state(manager, small), state(manager, b)) == ("closing", "closing")
    await manager.load(small, pin=True)
    manager.check_integrity()
    await settle()
    assert late.is_running and state(manager, large) == "closing"
    for client in (*clients, late, in_new):
        await client.finish()


async def test_operators_wait_in_the_queue_that_requests_wait_in() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B, max_waiting=2)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    loads = [asyncio.create_task(manager.load(pool)) for pool in (C, D)]
    await settle()
    assert manager.statistics().waiting_requests == 2
    with pytest.raises(TooManyWaiting):
        await manager.load(C)
    for load in loads:
        load.cancel()
    await asyncio.wait(loads)
    assert states(manager) == {"a": "resident", "b": "resident"}
    for client in clients:
        await client.finish()
    assert engine.operations == []


async def test_where_no_request_may_wait_an_operator_still_loads() -> None:
    manager = a_manager(FakeEngine(), max_waiting=0)
    with pytest.raises(TooManyWaiting, match="--max-waiting 0"):
        async with manager.lease(A):
            pass
    await manager.load(A)
    async with manager.lease(A) as lease:
        assert lease.is_hit


async def test_a_pin_whose_operator_has_left_is_not_made() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    pin = asyncio.create_task(manager.load(A, pin=True))
    load = await engine.next_held()
    pin.cancel()
    await asyncio.wait([pin])
    load.release()
    await settle()
    assert state(manager, A) == "resident"
    assert not manager.is_pinned(A)


# -- evict --


async def test_evicting_frees_only_what_no_other_pool_needs() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, AB)
    await manager.evict(A)
    stats = manager.statistics()
    assert (stats.used_slots, stats.evictions) == (4, 1)
    await manager.evict(AB)
    assert manager.statistics().used_slots == 2
    await manager.evict(B)
    assert manager.statistics().used_slots == 0
    await manager.evict(B)  # a no-op
    assert manager.statistics().evictions == 3
    manager.check_integrity()


async def test_after_evicting_everything_the_table_is_a_fresh_one() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, AB, slots=6, rows=6)
    for pool in (B, AB, A):
        await manager.evict(pool)
    empty, fresh = manager.statistics(), a_manager(FakeEngine(), slots=6, rows=6).statistics()
    assert (empty.layers, empty.pools, empty.free_rows) == (
        fresh.layers,
        fresh.pools,
        fresh.free_rows,
    )
    await manager.load(C)
    assert [copy.slot for copy in engine.operations[-1].copies] == [0, 1]


async def test_a_pool_in_use_is_not_evicted() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B)
    await manager.load(A, pin=True)
    with pytest.raises(PoolInUse, match="'a' is pinned; unpin it first"):
        await manager.evict(A, drain=True)
    async with manager.lease(B):
        with pytest.raises(PoolInUse, match="'b' has 1 running requests; .* drain=true"):
            await manager.evict(B)
    loading = asyncio.create_task(manager.load(C))
    load = await engine.next_held()
    with pytest.raises(PoolInUse, match="'c' is being loaded"):
        await manager.evict(C, drain=True)
    load.release()
    await loading
    manager.check_integrity()


async def test_draining_admits_no_requests_and_evicts_when_the_last_lease_ends() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    running = Client(manager, A)
    await settle()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    again = asyncio.create_task(manager.evict(A, drain=True))
    await settle()
    late = Client(manager, A)
    await settle()
    assert state(manager, A) == "closing" and not late.is_running and not drain.done()
    with pytest.raises(PoolInUse):
        await manager.evict(A)
    await running.finish()
    await drain
    await again
    assert manager.statistics().evictions == 1
    await settle()
    assert late.is_running  # the pool was loaded again for it
    assert engine.copied == [0, 1]
    await late.finish()
    manager.check_integrity()


@in_virtual_time
async def test_a_drain_that_takes_too_long_opens_the_pool_again() -> None:
    manager = await loaded(FakeEngine(), A, load_deadline_seconds=30.0)
    running = Client(manager, A)
    await settle()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await asyncio.sleep(10.0)
    late = Client(manager, A)
    with pytest.raises(PoolInUse, match="still has 1 running requests after 30 s"):
        await drain
    assert now() == 30.0
    await settle()
    assert late.is_running and state(manager, A) == "resident"
    await running.finish()
    await late.finish()


@in_virtual_time
async def test_a_drain_that_ends_in_the_moment_of_its_deadline_has_succeeded() -> None:
    manager = await loaded(FakeEngine(), A, load_deadline_seconds=30.0)
    lease = manager.lease(A)
    await lease.__aenter__()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await settle()

    def end_lease() -> None:
        with pytest.raises(StopIteration):
            lease.__aexit__(None, None, None).__await__().send(None)  # type: ignore[attr-defined]

    asyncio.get_running_loop().call_at(30.0 - 1e-12, end_lease)
    await drain
    assert states(manager) == {}
    manager.check_integrity()


async def test_a_drain_given_up_by_its_operator_opens_the_pool_again() -> None:
    manager = await loaded(FakeEngine(), A)
    running = Client(manager, A)
    await settle()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await settle()
    late = Client(manager, A)
    await settle()
    drain.cancel()
    await asyncio.wait([drain])
    await settle()
    assert late.is_running
    await running.finish()
    await late.finish()


async def test_a_pin_on_a_draining_pool_comes_after_the_drain() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    running = Client(manager, A)
    await settle()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await settle()
    pin = asyncio.create_task(manager.load(A, pin=True))
    await settle()
    assert not pin.done()
    await running.finish()
    await drain
    await pin
    assert manager.is_pinned(A)
    assert engine.copied == [0, 1]
    manager.check_integrity()


async def test_draining_what_the_first_in_the_queue_waits_for_loses_nothing() -> None:
    manager = await loaded(FakeEngine(), A, B)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    in_c = Client(manager, C)
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await settle()
    await clients[0].finish()
    await drain
    await settle()
    assert in_c.is_running
    await clients[1].finish()
    await in_c.finish()
    manager.check_integrity()


async def test_a_request_behind_a_drain_does_not_hold_up_the_queue() -> None:
    """A is first in the queue and on its way out; c, behind it, is served."""
    manager = await loaded(FakeEngine(), A)
    running = Client(manager, A)
    await settle()
    drain = asyncio.create_task(manager.evict(A, drain=True))
    await settle()
    late, in_c = Client(manager, A), Client(manager, C)
    await settle()
    assert in_c.is_running and not late.is_running
    await running.finish()
    await drain
    await settle()
    assert late.is_running
    await late.finish()
    await in_c.finish()


# -- retire --


async def test_a_retired_pool_goes_at_once_or_with_its_last_request() -> None:
    manager = await loaded(FakeEngine(), A, B)
    running = Client(manager, A)
    await settle()
    manager.retire(A)
    manager.retire(B)
    manager.retire(C)  # a no-op
    assert states(manager) == {"a": "closing"}
    await running.finish()
    assert states(manager) == {}
    assert manager.statistics().evictions == 2
    manager.check_integrity()


async def test_a_retired_pin_is_no_pin() -> None:
    manager = a_manager(FakeEngine())
    await manager.load(A, pin=True)
    manager.retire(A)
    assert not manager.is_pinned(A)
    assert states(manager) == {}


async def test_a_pool_redefined_is_another_pool_to_its_last_slot() -> None:
    """The old content serves its requests to the end, the new one is loaded beside it."""
    engine = FakeEngine()
    manager = await loaded(engine, A)
    old = Client(manager, A)
    await settle()
    redefined = a_pool("a", 1, 2)
    manager.retire(A)
    async with manager.lease(redefined) as lease:
        assert old.lease is not None and old.lease.row != lease.row
        assert engine.serves(lease.row, redefined)
        assert engine.serves(old.lease.row, A)
        await old.finish()
        assert [entry.content_hash for entry in manager.statistics().pools] == [
            redefined.content_hash
        ]
    assert engine.copied == [2]
    manager.check_integrity()


@pytest.mark.parametrize("is_waiting", [True, False])
async def test_stragglers_of_a_retired_pool_are_served_and_leave_nothing_behind(
    is_waiting: bool,
) -> None:
    """They waited already, or were admitted and ask a moment after the pool was retired."""
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine)
    stragglers = [Client(manager, A) for _ in range(2)] if is_waiting else []
    await settle()
    manager.retire(A)
    stragglers = stragglers or [Client(manager, A) for _ in range(2)]
    (await engine.next_held()).release()
    await settle()
    assert all(straggler.is_running for straggler in stragglers)
    for straggler in stragglers:
        await straggler.finish()
    await settle()
    assert manager.statistics().pools == ()
    assert manager.statistics().used_slots == 0
    manager.check_integrity()


async def test_a_pool_retired_and_defined_again_with_the_same_content_stays() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    running = Client(manager, A)
    await settle()
    manager.retire(A)
    manager.revive(a_pool("again", 0, 1))  # as the service does for what is defined
    manager.check_admissible(a_pool("again", 0, 1))
    again = Client(manager, a_pool("again", 0, 1))
    await settle()
    assert again.is_running
    await running.finish()
    await again.finish()
    assert states(manager) == {"a": "resident"}
    assert engine.operations == []


async def test_asking_whether_a_retired_pool_is_admissible_does_not_keep_it() -> None:
    """It is a question: a straggler runs to its end, and then the pool still goes."""
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    running = Client(manager, A)
    await settle()
    manager.retire(A)
    before = manager.statistics()
    manager.check_admissible(A)
    assert manager.statistics() == before
    straggler = Client(manager, A)
    await settle()
    assert state(manager, A) == "closing" and not straggler.is_running
    await running.finish()
    await settle()
    manager.check_admissible(A)  # loaded again, for the straggler alone
    assert straggler.is_running
    await straggler.finish()
    assert states(manager) == {"b": "resident"}
    manager.check_integrity()


async def test_only_a_revived_pool_outlives_its_stragglers() -> None:
    manager = await loaded(FakeEngine(), A, B)
    for pool in (A, B):
        manager.retire(pool)
    manager.revive(A)
    manager.revive(C)  # never retired: a no-op
    for pool in (A, B):
        async with manager.lease(pool):
            pass
    assert states(manager) == {"a": "resident"}
    manager.check_integrity()


async def test_a_pool_retired_while_it_loads_serves_its_waiters_and_goes() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    waiting = Client(manager, A)
    load = await engine.next_held()
    manager.retire(A)
    load.release()
    await settle()
    assert waiting.lease is not None and engine.serves(waiting.lease.row, A)
    await waiting.finish()
    assert states(manager) == {}
    manager.check_integrity()


@pytest.mark.parametrize("is_loading", [True, False])
async def test_operators_who_wait_for_a_retired_pool_are_told_and_pin_nothing(
    is_loading: bool,
) -> None:
    """A pin of a pool without a definition could never be undone."""
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, B)
    running = Client(manager, B)
    await settle()
    pool = A if is_loading else a_pool("wide", 0, 1, 4)  # which needs b to go
    pin = asyncio.create_task(manager.load(pool, pin=True))
    load = asyncio.create_task(manager.load(pool))
    request = Client(manager, pool)
    await settle()
    assert state(manager, pool) == ("loading" if is_loading else "waiting")
    manager.retire(pool)
    for task in (pin, load):
        with pytest.raises(StateConflict, match="redefined or removed"):
            await task
    await running.finish()
    (await engine.next_held()).release()
    await settle()
    assert request.is_running and not manager.is_pinned(pool)
    await request.finish()
    manager.check_integrity()


async def test_retiring_opens_what_was_closed_when_no_request_waits() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B)
    clients = [Client(manager, A), Client(manager, B)]
    await settle()
    load = asyncio.create_task(manager.load(C))
    await settle()
    assert state(manager, A) == "closing"
    manager.retire(C)
    with pytest.raises(StateConflict):
        await load
    assert states(manager) == {"a": "resident", "b": "resident"}
    for client in clients:
        await client.finish()
    assert engine.operations == []


async def test_retiring_makes_room_for_waiting_requests() -> None:
    manager = await loaded(FakeEngine(), A, B)
    await manager.load(A, pin=True)
    await manager.load(B, pin=True)
    with pytest.raises(PoolBlocked):
        await manager.load(C)
    manager.retire(A)
    await manager.load(C)
    assert states(manager).keys() == {"b", "c"}
