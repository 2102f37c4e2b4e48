"""Leases, loads and failures of the ResidencyManager, with an engine that ends when told to.

The waiting queue has tests of its own, and so have operators' changes.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from emo_serve.errors import (
    ConfigError,
    Draining,
    EngineDead,
    PoolLoadFailed,
    PoolTooLarge,
)
from emo_serve.residency.manager import Lease
from emo_serve.residency.ports import LoadReport, NullObserver
from emo_serve.residency.slots import Copy
from tests.support.fake_engine import SLOT_BYTES, FakeEngine, settle
from tests.support.residency_world import (
    AB,
    BASE,
    BC,
    NUM_EXPERTS,
    A,
    B,
    C,
    Client,
    D,
    a_manager,
    a_pool,
    loaded,
    state,
    states,
    status,
)

# -- leases --


async def test_a_lease_on_a_resident_pool_needs_no_engine_and_no_wait() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    lease = manager.lease(A)
    with pytest.raises(StopIteration) as entered:
        lease.__aenter__().__await__().send(None)  # type: ignore[attr-defined]
    assert entered.value.value == Lease(row=1, pool=A, is_hit=True)
    with pytest.raises(StopIteration):  # and neither does giving it back
        lease.__aexit__(None, None, None).__await__().send(None)  # type: ignore[attr-defined]
    assert manager.statistics().running_requests == 0
    assert engine.operations == []


async def test_leases_are_counted_by_pool() -> None:
    manager = await loaded(FakeEngine(), A, B)
    async with manager.lease(A), manager.lease(A), manager.lease(B):
        assert manager.statistics().running_requests == 3
        entry = status(manager, A)
        assert entry is not None
        assert (entry.name, entry.row, entry.running_requests) == ("a", 1, 2)
    assert manager.statistics().running_requests == 0
    manager.check_integrity()


async def test_a_lease_ends_when_its_request_fails_or_is_cancelled() -> None:
    manager = await loaded(FakeEngine(), A)
    with pytest.raises(RuntimeError, match="generation failed"):
        async with manager.lease(A):
            raise RuntimeError("generation failed")
    client = Client(manager, A)
    await settle()
    assert manager.statistics().running_requests == 1
    await client.leave()
    assert manager.statistics().running_requests == 0
    manager.check_integrity()


async def test_only_the_request_whose_pool_must_be_loaded_waits() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    waiting = Client(manager, B)
    load = await engine.next_held()
    for _ in range(3):
        async with manager.lease(A) as lease:
            assert engine.serves(lease.row, A)
    assert (state(manager, B), waiting.is_running) == ("loading", False)
    load.release()
    await settle()
    assert waiting.lease is not None
    assert waiting.lease == Lease(row=2, pool=B, is_hit=False)
    assert engine.serves(2, B)
    await waiting.finish()


# -- loads --


async def test_a_load_copies_only_what_is_missing() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, slots=8)
    await manager.load(a_pool("overlaps", 1, 2))
    assert engine.copied == [2]
    await manager.load(a_pool("covered", 0, 2))
    assert engine.copied == [2]
    assert len(engine.operations) == 2  # the second only publishes
    assert manager.statistics().used_slots == 3


async def test_loading_what_is_resident_does_nothing_whatever_its_name() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    await manager.load(A)
    await manager.load(a_pool("same-experts", 1, 0))
    assert engine.operations == []


async def test_a_pool_at_another_temperature_has_a_row_of_its_own() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    hot = a_pool("hot", 0, 1, temperature=2.0)
    async with manager.lease(hot) as lease, manager.lease(A) as other:
        assert (lease.row, other.row) == (2, 1)
        assert engine.serves(2, hot) and engine.serves(1, A)
    assert engine.copied == []


async def test_a_load_evicts_only_what_is_needed() -> None:
    """The coldest alone would not be enough, the next two alone would: the coldest stays."""
    engine = FakeEngine()
    small, middle, large = a_pool("s", 0), a_pool("m", 1, 2), a_pool("l", 3, 4, 5)
    manager = await loaded(engine, small, middle, large, slots=7)
    await manager.load(a_pool("new", 6, 7))  # one slot is free
    assert states(manager).keys() == {"m", "l", "new"}
    await manager.load(a_pool("next", 0, 1, 6, 7))  # all that m has not
    assert states(manager).keys() == {"l", "new", "next"}
    manager.check_integrity()


async def test_what_a_later_choice_made_unnecessary_stays() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, a_pool("cold", 0), a_pool("warm", 1, 2), slots=4)
    async with manager.lease(a_pool("wide", 4, 5, 6)):  # cold would not do, warm does alone
        assert states(manager) == {"cold": "resident", "wide": "resident"}


async def test_experts_that_a_victim_and_the_new_pool_share_are_not_copied() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, AB)
    await manager.load(BC)
    assert states(manager) == {"b+c": "resident"}
    assert engine.copied == [4, 5]
    async with manager.lease(BC) as lease:
        assert engine.serves(lease.row, BC)


async def test_what_holds_no_slot_alone_goes_before_what_is_colder() -> None:
    """A row is all that is missing: a comes back without a copy, c would not."""
    engine = FakeEngine()
    manager = await loaded(engine, C, A, AB, slots=8, rows=4)
    await manager.load(D)
    assert states(manager).keys() == {"c", "a+b", "d"}
    await manager.load(A)
    assert engine.copied == [6, 7]


async def test_pools_that_cover_each_other_do_not_both_go_first() -> None:
    """Neither holds a slot alone, so either may go for nothing; the hotter one has its experts."""
    hot = a_pool("hot", 0, 1, temperature=2.0)
    manager = await loaded(FakeEngine(), A, B, hot)
    await manager.load(C)
    assert states(manager).keys() >= {"hot", "c"}
    assert "b" not in states(manager)


async def test_the_policy_says_who_is_coldest() -> None:
    manager = await loaded(FakeEngine(), A, B)
    async with manager.lease(A):
        pass
    await manager.load(C)
    assert states(manager).keys() == {"a", "c"}


async def test_loads_go_one_at_a_time_and_are_shared() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine, slots=8)
    loads = [asyncio.create_task(manager.load(pool)) for pool in (A, B, A, C)]
    await settle()
    while engine.held:
        manager.check_integrity()
        assert len(engine.held) == 1
        engine.held[0].release()
        await settle()
    await asyncio.gather(*loads)
    assert engine.copied == [0, 1, 2, 3, 4, 5]


async def test_the_base_pool_has_row_0_and_nothing_else_has() -> None:
    engine = FakeEngine()
    hot = a_pool("hot", *range(NUM_EXPERTS), temperature=2.0)
    manager = await loaded(engine, A, BASE, hot, slots=NUM_EXPERTS)
    rows = {entry.name: entry.row for entry in manager.statistics().pools}
    assert rows == {"a": 1, "base": 0, "hot": 2}
    assert engine.table[2] == (BASE.expert_ids, 2.0)


async def test_more_pools_than_rows_take_turns_and_row_0_is_never_handed_out() -> None:
    engine = FakeEngine()
    manager = a_manager(engine, slots=NUM_EXPERTS, rows=3)
    for pool, row in ((A, 1), (B, 2), (C, 1), (BASE, 0), (D, 2), (A, 1)):
        async with manager.lease(pool) as lease:
            assert lease.row == row
            assert engine.serves(row, pool)
        manager.check_integrity()
    assert manager.statistics().free_rows == 0


# -- refusals at the door --


async def test_a_pool_that_can_never_fit_is_refused_and_nothing_is_evicted() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, C)
    before = manager.statistics()
    with pytest.raises(PoolTooLarge) as caught:
        manager.check_admissible(BASE)
    message = str(caught.value)
    for part in ("layer 0 needs 8 slots and has 4", "8 experts take", "GiB", "--expert-slots"):
        assert part in message
    with pytest.raises(PoolTooLarge):
        await manager.load(BASE)
    with pytest.raises(PoolTooLarge):
        async with manager.lease(BASE):
            pass
    after = manager.statistics()
    assert after.pools == before.pools
    assert engine.operations == []


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of the pool table: 0"):
        a_manager(FakeEngine(), rows=0)


# -- failures --


async def test_a_load_that_fails_midway_leaves_the_tables_as_they_were() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    before = manager.statistics()
    clients = [Client(manager, B) for _ in range(3)]
    (await engine.next_held()).fail(PoolLoadFailed("expert 2 of layer 0: truncated"))
    for client in clients:
        with pytest.raises(PoolLoadFailed, match="truncated"):
            await client.task
    after = manager.statistics()
    assert (after.layers, after.pools, after.free_rows) == (
        before.layers,
        before.pools,
        before.free_rows,
    )
    assert (after.failed_loads, after.loads) == (1, before.loads)
    manager.check_integrity()
    engine.is_holding = False
    async with manager.lease(B) as lease:  # the next request tries again
        assert engine.serves(lease.row, B)


async def test_a_failed_load_turns_away_only_those_who_wait_for_it() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, slots=8)
    running, failing, later = Client(manager, A), Client(manager, B), Client(manager, C)
    (await engine.next_held()).fail(PoolLoadFailed("gone"))
    with pytest.raises(PoolLoadFailed):
        await failing.task
    (await engine.next_held()).release()
    await settle()
    assert running.is_running and later.is_running
    await running.finish()
    await later.finish()
    manager.check_integrity()


async def test_unreadable_experts_are_found_before_anything_is_evicted() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    engine.unreadable = {(0, 5)}
    before = manager.statistics()
    with pytest.raises(PoolLoadFailed, match="expert 5 of layer 0"):
        async with manager.lease(C):
            pass
    after = manager.statistics()
    assert (after.pools, after.layers, after.evictions) == (before.pools, before.layers, 0)
    assert engine.operations == []
    engine.unreadable = set()
    await manager.load(C)
    manager.check_integrity()


async def test_any_error_of_the_check_is_that_pools_alone() -> None:
    """The check runs in the call that released a lease: that request did nothing wrong."""

    class Broken(FakeEngine):
        def check_readable(self, copies: object) -> None:
            raise OSError("disk on fire")

    engine = Broken()
    manager = a_manager(engine, slots=2)
    engine.check_readable = lambda copies: None  # type: ignore[method-assign]
    running = Client(manager, A)
    await settle()
    del engine.check_readable
    waiting, next_in_queue = Client(manager, B), Client(manager, A)
    await settle()
    await running.finish()
    with pytest.raises(OSError, match="disk on fire"):
        await waiting.task
    await settle()
    assert next_in_queue.is_running
    await next_in_queue.finish()
    manager.check_integrity()


async def test_a_dead_engine_fails_every_load_and_no_more() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    engine.failure = EngineDead("the engine process died")
    clients = [Client(manager, pool) for pool in (B, C, B)]
    for client in clients:
        with pytest.raises(EngineDead):
            await client.task
    assert manager.statistics().waiting_requests == 0
    assert states(manager) == {"a": "resident"}
    manager.check_integrity()


async def test_row_0_stays_the_base_pools_when_it_failed_to_load() -> None:
    engine = FakeEngine()
    hot = a_pool("hot", *range(NUM_EXPERTS), temperature=2.0)
    manager = await loaded(engine, hot, slots=NUM_EXPERTS, rows=3)
    engine.failure = EngineDead("by chance")
    with pytest.raises(EngineDead):
        await manager.load(BASE)
    engine.failure = None
    for pool, row in ((BASE, 0), (A, 2), (BASE, 0)):
        async with manager.lease(pool) as lease:
            assert lease.row == row


async def test_a_timeout_of_the_engines_own_is_not_taken_for_the_deadline() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    client = Client(manager, A)
    (await engine.next_held()).fail(TimeoutError("the file server did not answer"))
    with pytest.raises(TimeoutError, match="file server"):
        await client.task


async def test_a_load_that_the_engine_cancels_is_a_failed_load() -> None:
    """The call raises CancelledError, though no one cancelled the load: its client gave it up."""
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine, slots=2)
    client, next_in_queue = Client(manager, A), Client(manager, B)
    (await engine.next_held()).done.cancel()
    with pytest.raises(EngineDead, match="given up"):
        await client.task
    (await engine.next_held()).release()
    await settle()
    await next_in_queue.finish()
    manager.check_integrity()


def test_a_load_under_way_does_not_outlive_the_event_loop() -> None:
    engine = FakeEngine(is_holding=True)

    async def program() -> None:
        manager = a_manager(engine)
        for pool in (A, B, C):
            Client(manager, pool)
        await engine.next_held()

    asyncio.run(program())
    assert engine.held == [] and len(engine.operations) == 1


async def test_a_failure_that_no_request_waits_for_is_not_reported_by_asyncio() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    client = Client(manager, A)
    load = await engine.next_held()
    await client.leave()
    load.fail(EngineDead("gone"))
    await settle()
    manager.check_integrity()
    assert manager.statistics().pools == ()
    assert reported == []


async def test_an_observer_that_fails_is_logged_and_stops_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(NullObserver):
        def count_load(self, *args: object, **kwargs: object) -> None:
            raise ValueError("no such label")

    manager = a_manager(FakeEngine(), observer=Broken())
    with caplog.at_level(logging.ERROR):
        async with manager.lease(A):
            pass
    assert "no such label" in caplog.text
    manager.check_integrity()


async def test_an_observer_is_told_of_copies_and_failures() -> None:
    """One record for each load that copied; a union of resident pools only publishes a row."""
    events: list[tuple[str, LoadReport | None]] = []

    class Recording(NullObserver):
        def count_load(self, pool: str, report: LoadReport) -> None:
            events.append((pool, report))

        def count_failed_load(self, pool: str) -> None:
            events.append((pool, None))

    engine = FakeEngine()
    manager = a_manager(engine, slots=8, observer=Recording())
    for pool in (A, B, AB, BC):
        await manager.load(pool)
    engine.failure = PoolLoadFailed("gone")
    engine.unreadable = {(0, 7)}
    for pool in (D, a_pool("e", 6)):  # before the load, and in it
        with pytest.raises(PoolLoadFailed):
            await manager.load(pool)
    assert [name for name, report in events if report is None] == ["d", "e"]
    reports = {name: report for name, report in events if report is not None}
    assert reports.keys() == {"a", "b", "b+c"}
    of_union = reports["b+c"]
    assert (of_union.num_experts, of_union.experts_copied) == (4, 2)
    assert (of_union.slab_hits, of_union.host_hits, of_union.disk_reads) == (2, 0, 2)
    assert (of_union.bytes_copied, of_union.bytes_read) == (2 * SLOT_BYTES, 2 * SLOT_BYTES)
    stats = manager.statistics()
    assert (stats.loads, stats.failed_loads) == (3, 2)


# -- shutdown --


async def test_draining_refuses_new_requests_and_waits_for_running_and_waiting_ones() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    running, waiting = Client(manager, A), Client(manager, B)
    load = await engine.next_held()
    manager.start_draining()
    manager.start_draining()
    assert manager.statistics().is_draining
    for pool in (A, B):
        with pytest.raises(Draining, match="shutting down"):
            manager.check_admissible(pool)
    async with manager.lease(A):  # a later step of a request let in before
        pass
    drained = asyncio.create_task(manager.drained(timeout_seconds=60))
    await settle()
    assert not await manager.drained(timeout_seconds=0)
    await running.finish()
    await settle()
    assert not drained.done()
    load.release()
    await settle()
    assert waiting.is_running and not drained.done()
    await waiting.finish()
    assert await drained


async def test_draining_ends_when_the_last_who_waits_leaves_or_fails() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    leaving, failing = Client(manager, A), Client(manager, B)
    drained = asyncio.create_task(manager.drained(timeout_seconds=60))
    await settle()
    await leaving.leave()
    (await engine.next_held()).release()
    await settle()
    assert not drained.done()
    (await engine.next_held()).fail(PoolLoadFailed("gone"))
    assert await drained
    assert isinstance(failing.task.exception(), PoolLoadFailed)


async def test_an_idle_manager_is_drained_at_once() -> None:
    assert await a_manager(FakeEngine()).drained(timeout_seconds=0)


# -- accounts --


async def test_statistics_are_a_snapshot() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, slots=6, rows=6)
    before = manager.statistics()
    assert (before.total_slots, before.used_slots, before.free_slots) == (6, 2, 4)
    assert (before.used_bytes, before.slot_bytes) == (2 * SLOT_BYTES, SLOT_BYTES)
    assert (before.num_rows, before.free_rows) == (6, 4)
    client, waiting = Client(manager, A), Client(manager, B)
    await settle()
    during = manager.statistics()
    assert (during.running_requests, during.waiting_requests, during.leased_slots) == (1, 1, 2)
    assert (during.layers[0].loading, during.used_slots) == (2, 4)
    assert before.used_slots == 2
    engine.held[0].release()
    await settle()
    await client.finish()
    await waiting.finish()
    after = manager.statistics()
    assert (after.hits, after.misses, after.loads, after.evictions) == (1, 1, 2, 0)


async def test_a_slot_that_two_leased_pools_share_counts_once() -> None:
    manager = await loaded(FakeEngine(), A, B, AB)
    async with manager.lease(A), manager.lease(AB):
        assert manager.statistics().leased_slots == 4


async def test_a_union_of_resident_pools_is_a_hit_and_one_to_be_loaded_a_miss() -> None:
    manager = await loaded(FakeEngine(), A, B, slots=8)
    async with manager.lease(AB) as union, manager.lease(BC) as other:
        assert (union.is_hit, other.is_hit) == (True, False)
    stats = manager.statistics()
    assert (stats.hits, stats.misses) == (1, 1)


async def test_what_the_server_asks_for_itself_is_in_no_figure_of_its_clients() -> None:
    asks: list[str] = []
    waits: list[str] = []

    class Recording(NullObserver):
        def count_ask(self, pool: str, *, is_hit: bool) -> None:
            asks.append(pool)

        def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
            waits.append(pool)

    now = 0.0
    manager = a_manager(FakeEngine(), observer=Recording(), clock=lambda: now)
    await manager.load(A)  # at the start, or for an operator
    async with manager.lease(A, is_own=True), manager.lease(B, is_own=True):
        assert manager.statistics().running_requests == 2
        now = 14.0
    times = manager._queue.times
    assert (asks, waits, times.typical()) == ([], [], 0)
    async with manager.lease(C):
        now = 15.0
    assert (asks, waits, times.typical()) == (["c"], ["c"], 1)
    manager.check_integrity()


async def test_fits_now_asks_for_room_without_evictions() -> None:
    manager = await loaded(FakeEngine(), A, rows=3)
    assert manager.fits_now(A) and manager.fits_now(B) and not manager.fits_now(BC)
    await manager.load(B)
    assert not manager.fits_now(AB)  # no row
    assert manager.fits_now(B)


async def test_the_engine_is_told_what_and_where() -> None:
    engine = FakeEngine()
    await loaded(engine)
    manager = a_manager(engine)
    await manager.load(a_pool("hot", 3, 1, temperature=2.0))
    (operation,) = engine.operations
    assert (operation.row, operation.expert_ids, operation.temperature) == (1, ((1, 3), ()), 2.0)
    assert operation.copies == (Copy(0, 1, 0), Copy(0, 3, 1))
