"""ResidencyManager with an engine whose operations end when the test says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from emo_serve.errors import (
    ConfigError,
    Draining,
    EngineDead,
    NoFreePoolRow,
    PoolNotResident,
    PoolTooLarge,
)
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.manager import Lease, PoolResidency, ResidencyManager
from emo_serve.residency.slots import SlotTable
from tests.fakes import SLOT_BYTES, FakeEngine, settle

NUM_EXPERTS = 8


def a_pool(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    return ExpertPool(name, (LayerExperts(experts), None), temperature)


A, B, C = a_pool("a", 0, 1), a_pool("b", 1, 2), a_pool("c", 3)
AB, BC, AC = A.union(B), B.union(C), A.union(C)
BASE = a_pool("base", *range(NUM_EXPERTS))


def a_manager(engine: FakeEngine, *, slots: int = 6, rows: int = 6) -> ResidencyManager:
    table = SlotTable((NUM_EXPERTS, 0), slots)
    return ResidencyManager(table, rows, engine, slot_bytes=SLOT_BYTES)


async def loaded(
    engine: FakeEngine, *pools: ExpertPool, slots: int = 6, rows: int = 6
) -> ResidencyManager:
    """Return a manager with these pools resident; the engine holds from then on if it did."""
    manager = a_manager(engine, slots=slots, rows=rows)
    holding, engine.is_holding = engine.is_holding, False
    for pool in pools:
        await manager.load(pool)
    engine.is_holding = holding
    manager.check_integrity()
    return manager


def residency(manager: ResidencyManager, pool: ExpertPool) -> PoolResidency | None:
    by_hash = {entry.content_hash: entry for entry in manager.statistics().pools}
    return by_hash.get(pool.content_hash)


async def hold(manager: ResidencyManager, pool: ExpertPool, until: asyncio.Event) -> int:
    """Behave as a request: lease the pool, run until told, return the row it ran on."""
    async with manager.lease(pool) as lease:
        await until.wait()
        return lease.row


# -- loading --


async def test_loading_copies_then_publishes_then_grants() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    load = asyncio.create_task(manager.load(A))
    copying = await engine.next_held()
    assert [copy.expert for copy in copying.copies] == [0, 1]
    with pytest.raises(PoolNotResident, match="2 of its 2 experts are not in device memory"):
        manager.check_available(A)
    copying.release()
    await settle()
    publishing = await engine.next_held()
    assert (publishing.kind, publishing.row, publishing.temperature) == ("publish", 1, 1.0)
    assert not load.done()
    publishing.release()
    await load
    manager.check_available(A)
    manager.check_integrity()
    async with manager.lease(A) as lease:
        assert lease == Lease(row=1, pool=A)
        assert engine.table[lease.row] == (A.expert_ids, 1.0)
    assert len(engine.operations) == 2


async def test_loading_copies_only_what_is_missing() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    copied = [copy.expert for operation in engine.operations for copy in operation.copies]
    assert copied == [0, 1, 2]
    assert manager.statistics().used_slots == 3
    await manager.load(AB)
    assert len([operation for operation in engine.operations if operation.copies]) == 2


async def test_loading_a_resident_pool_again_does_nothing() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A)
    done = len(engine.operations)
    await manager.load(A)
    await manager.load(a_pool("same-experts", 1, 0))
    assert len(engine.operations) == done


async def test_the_base_pool_has_row_0_and_nothing_else_has() -> None:
    engine = FakeEngine()
    hot = a_pool("hot", *range(NUM_EXPERTS), temperature=2.0)
    manager = await loaded(engine, A, BASE, hot, slots=NUM_EXPERTS)
    rows = {entry.name: entry.row for entry in manager.statistics().pools}
    assert rows == {"a": 1, "base": 0, "hot": 2}
    assert engine.table[2] == (BASE.expert_ids, 2.0)


async def test_row_0_stays_the_base_pools_when_it_was_never_loaded_or_failed_to() -> None:
    engine = FakeEngine()
    hot = a_pool("hot", *range(NUM_EXPERTS), temperature=2.0)
    manager = await loaded(engine, hot, slots=NUM_EXPERTS, rows=3)
    engine.failure = EngineDead("by chance")
    with pytest.raises(EngineDead):
        async with manager.lease(BASE):
            pass
    engine.failure = None
    for pool, row in ((BASE, 0), (A, 2), (B, 2), (BASE, 0)):
        async with manager.lease(pool) as lease:
            assert lease.row == row
        manager.check_integrity()


async def test_a_pool_that_can_never_fit_is_refused_with_the_memory_it_needs() -> None:
    manager = await loaded(FakeEngine(), A, C, slots=6)
    for refuse in (manager.check_available, manager.load):
        with pytest.raises(PoolTooLarge) as caught:
            waiting = refuse(BASE)
            if waiting is not None:
                await waiting
        message = str(caught.value)
        for part in ("needs 8 slots and has 6", "8 experts take", "GiB", "resident pools: a, c"):
            assert part in message
    manager.check_integrity()


async def test_a_pool_that_does_not_fit_beside_the_others_is_not_loaded() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, C, slots=4)
    before = manager.statistics()
    with pytest.raises(PoolNotResident, match="needs 2 more slots and has 1 free of 4"):
        await manager.load(a_pool("d", 4, 5))
    assert manager.statistics() == before
    await manager.load(a_pool("e", 4))
    manager.check_integrity()


async def test_loads_go_one_at_a_time() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    loads = [asyncio.create_task(manager.load(pool)) for pool in (A, B, A, C)]
    await settle()
    while engine.held:
        manager.check_integrity()
        assert len(engine.held) == 1
        engine.held[0].release()
        await settle()
    await asyncio.gather(*loads)
    kinds = [operation.kind for operation in engine.operations]
    assert kinds == ["load", "publish"] * 3
    copied = [copy.expert for operation in engine.operations for copy in operation.copies]
    assert sorted(copied) == [0, 1, 2, 3]


async def test_a_cancelled_caller_does_not_stop_the_load() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    load = asyncio.create_task(manager.load(A))
    copying = await engine.next_held()
    load.cancel()
    await asyncio.wait([load])
    assert load.cancelled()
    second = asyncio.create_task(manager.load(B))
    await settle()
    assert engine.held == [copying]
    engine.is_holding = False
    copying.release()
    await second
    manager.check_available(A)
    manager.check_available(B)
    manager.check_integrity()


@pytest.mark.parametrize("step", ["load", "publish"])
async def test_a_failed_load_leaves_the_tables_as_they_were(step: str) -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    before = manager.statistics()
    load = asyncio.create_task(manager.load(B))
    operation = await engine.next_held()
    if step == "publish":
        operation.release()
        await settle()
        operation = await engine.next_held()
    assert operation.kind == step
    operation.fail(EngineDead("rank 1: out of memory"))
    with pytest.raises(EngineDead, match="rank 1"):
        await load
    assert manager.statistics() == before
    manager.check_integrity()
    with pytest.raises(PoolNotResident):
        manager.check_available(B)
    engine.is_holding = False
    await manager.load(B)
    manager.check_available(B)
    manager.check_integrity()


async def test_a_failure_nobody_waits_for_is_not_reported_by_asyncio() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    load = asyncio.create_task(manager.load(A))
    copying = await engine.next_held()
    load.cancel()
    await asyncio.wait([load])
    copying.fail(EngineDead("gone"))
    await settle()
    manager.check_integrity()
    assert manager.statistics().pools == ()
    assert reported == []


# -- leases --


async def test_leases_are_counted_by_pool() -> None:
    manager = await loaded(FakeEngine(), A, B)
    async with manager.lease(A), manager.lease(A), manager.lease(B):
        assert manager.statistics().running_requests == 3
        entry = residency(manager, A)
        assert entry is not None
        assert (entry.name, entry.running_requests, entry.is_kept) == ("a", 2, True)
    assert manager.statistics().running_requests == 0
    manager.check_integrity()


async def test_a_lease_on_a_resident_pool_needs_no_engine_and_no_wait() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A)
    lease = manager.lease(A)
    with pytest.raises(StopIteration) as entered:
        lease.__aenter__().__await__().send(None)  # type: ignore[attr-defined]
    assert entered.value.value.pool is A
    with pytest.raises(StopIteration):  # and neither does giving it back
        lease.__aexit__(None, None, None).__await__().send(None)  # type: ignore[attr-defined]
    assert manager.statistics().running_requests == 0


async def test_a_lease_ends_when_its_request_fails_or_is_cancelled() -> None:
    manager = await loaded(FakeEngine(), A)
    with pytest.raises(RuntimeError, match="generation failed"):
        async with manager.lease(A):
            raise RuntimeError("generation failed")
    request = asyncio.create_task(hold(manager, A, asyncio.Event()))
    await settle()
    assert manager.statistics().running_requests == 1
    request.cancel()
    await asyncio.wait([request])
    assert manager.statistics().running_requests == 0
    manager.check_integrity()


async def test_a_pool_that_is_not_resident_is_refused() -> None:
    manager = await loaded(FakeEngine(), A)
    message = "pool 'b' is not resident: 1 of its 2 .* resident pools: a$"
    with pytest.raises(PoolNotResident, match=message):
        manager.check_available(B)
    with pytest.raises(PoolNotResident, match=message):
        async with manager.lease(B):
            pass
    assert not manager.is_resident(B)
    manager.check_integrity()


# -- unions --


async def test_a_union_of_resident_pools_is_published_once_and_copies_nothing() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B)
    copies = sum(len(operation.copies) for operation in engine.operations)
    manager.check_available(AB)
    for _ in range(3):
        async with manager.lease(AB) as lease:
            assert engine.table[lease.row] == (((0, 1, 2), ()), 1.0)
            manager.check_integrity()
    assert engine.num_published == 3
    assert sum(len(operation.copies) for operation in engine.operations) == copies
    entry = residency(manager, AB)
    assert entry is not None
    assert (entry.row, entry.is_kept, entry.running_requests) == (3, False, 0)


async def test_a_union_with_a_pool_that_is_not_resident_is_refused() -> None:
    manager = await loaded(FakeEngine(), A)
    with pytest.raises(PoolNotResident, match="'a\\+c' is not resident: 1 of its 3"):
        manager.check_available(AC)


async def test_any_pool_whose_experts_are_resident_is_served() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, BASE, slots=NUM_EXPERTS)
    async with manager.lease(C) as lease:
        assert engine.table[lease.row] == (C.expert_ids, 1.0)
    assert manager.is_resident(B)


async def test_simultaneous_requests_for_a_union_share_one_publication() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B)
    published, finish = engine.num_published, asyncio.Event()
    requests = [asyncio.create_task(hold(manager, AB, finish)) for _ in range(5)]
    publishing = await engine.next_held()
    await settle()
    assert engine.held == [publishing]
    manager.check_available(AB)
    manager.check_integrity()
    publishing.release()
    finish.set()
    assert await asyncio.gather(*requests) == [3] * 5
    assert engine.num_published == published + 1
    manager.check_integrity()


async def test_a_client_that_leaves_does_not_break_the_publication() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B)
    finish = asyncio.Event()
    leaver = asyncio.create_task(hold(manager, AB, finish))
    stayer = asyncio.create_task(hold(manager, AB, finish))
    publishing = await engine.next_held()
    leaver.cancel()
    await asyncio.wait([leaver])
    manager.check_integrity()
    publishing.release()
    finish.set()
    assert await stayer == 3
    assert leaver.cancelled()
    manager.check_integrity()


async def test_a_publication_every_client_left_leaves_a_row_to_reuse() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B, C, rows=5)
    leaver = asyncio.create_task(hold(manager, AB, asyncio.Event()))
    publishing = await engine.next_held()
    leaver.cancel()
    await asyncio.wait([leaver])
    with pytest.raises(NoFreePoolRow):  # the worker is still writing that row
        manager.check_available(BC)
    publishing.release()
    await settle()
    manager.check_integrity()
    engine.is_holding = False
    async with manager.lease(BC) as lease:
        assert lease.row == 4
    manager.check_integrity()


async def test_a_failed_publication_reaches_every_waiter_and_is_tried_again() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, A, B)
    before = manager.statistics()
    requests = [asyncio.create_task(hold(manager, AB, asyncio.Event())) for _ in range(3)]
    publishing = await engine.next_held()
    await settle()
    publishing.fail(EngineDead("rank 0 did not answer"))
    for request in requests:
        with pytest.raises(EngineDead, match="rank 0"):
            await request
    assert manager.statistics() == before
    manager.check_integrity()
    engine.is_holding = False
    async with manager.lease(AB) as lease:
        assert lease.row == 3


async def test_the_union_unused_longest_gives_up_its_row() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, C, rows=6)  # rows 4 and 5 are for unions
    async with manager.lease(AB), manager.lease(BC):
        pass
    async with manager.lease(AB):
        pass
    async with manager.lease(AC) as lease:
        assert lease.row == 5
    assert residency(manager, BC) is None
    assert residency(manager, AB) is not None
    manager.check_integrity()


async def test_a_leased_row_is_never_rewritten() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, C, rows=5)
    async with manager.lease(AB) as lease:
        with pytest.raises(NoFreePoolRow, match="all 5 are taken"):
            manager.check_available(BC)
        with pytest.raises(NoFreePoolRow):
            async with manager.lease(BC):
                pass
        assert engine.table[lease.row] == (AB.expert_ids, 1.0)
    async with manager.lease(BC) as second:
        assert second.row == lease.row


async def test_a_loaded_pool_keeps_its_row_though_it_began_as_a_union() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, C, rows=5)
    async with manager.lease(AB):
        pass
    await manager.load(AB)
    with pytest.raises(NoFreePoolRow):
        manager.check_available(BC)
    manager.check_integrity()


# -- shutdown --


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    manager = await loaded(FakeEngine(), A)
    finish = asyncio.Event()
    requests = [asyncio.create_task(hold(manager, A, finish)) for _ in range(2)]
    await settle()
    manager.start_draining()
    manager.start_draining()
    assert manager.statistics().is_draining
    with pytest.raises(Draining, match="shutting down"):
        manager.check_available(A)
    async with manager.lease(A):  # a later step of a request let in before
        pass
    drained = asyncio.create_task(manager.drained(timeout_seconds=60))
    await settle()
    assert not drained.done()
    assert not await manager.drained(timeout_seconds=0)
    finish.set()
    assert await drained
    assert await asyncio.gather(*requests) == [1, 1]


async def test_an_idle_manager_is_drained_at_once() -> None:
    assert await a_manager(FakeEngine()).drained(timeout_seconds=0)


# -- accounts --


async def test_statistics_are_a_snapshot() -> None:
    manager = await loaded(FakeEngine(), A, slots=6)
    before = manager.statistics()
    assert (before.total_slots, before.used_slots, before.slot_bytes) == (6, 2, SLOT_BYTES)
    assert (before.num_rows, before.free_rows) == (6, 4)
    await manager.load(B)
    assert before.used_slots == 2
    assert manager.statistics().used_slots == 3


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of the pool table: 0"):
        a_manager(FakeEngine(), rows=0)


@pytest.mark.parametrize("seed", range(8))
async def test_random_traffic_never_finds_a_wrong_row(seed: int) -> None:
    """Leases, cancellations and failures at random; every granted row holds its own pool."""
    chance = random.Random(seed)
    engine = FakeEngine(is_holding=True)
    pools: Sequence[ExpertPool] = [A, B, C, AB, BC, AC, AB.union(C), a_pool("d", 2)]
    manager = await loaded(engine, A, B, C, rows=6)

    def not_leased(row: int) -> None:
        rows = {entry.row: entry for entry in manager.statistics().pools}
        assert not rows[row].is_published

    engine.on_publish = not_leased
    served = 0

    async def request() -> None:
        nonlocal served
        pool = chance.choice(pools)
        async with AsyncExitStack() as stack:
            try:
                lease = await stack.enter_async_context(manager.lease(pool))
            except (NoFreePoolRow, EngineDead):
                return
            for _ in range(chance.randrange(4)):
                assert engine.table[lease.row] == (pool.expert_ids, pool.router_temperature)
                await asyncio.sleep(0)
            served += 1

    requests: list[asyncio.Task[None]] = []
    for _ in range(300):
        requests.append(asyncio.create_task(request()))
        if engine.held and chance.random() < 0.5:
            operation = chance.choice(engine.held)
            if chance.random() < 0.2:
                operation.fail(EngineDead("by chance"))
            else:
                operation.release()
        if chance.random() < 0.3:
            chance.choice(requests).cancel()
        await asyncio.sleep(0)
        manager.check_integrity()
    await settle()
    while engine.held:
        engine.held[0].release()
        await settle()
    await asyncio.wait(requests)
    for finished in requests:
        assert finished.cancelled() or finished.exception() is None
    assert served > 50
    assert manager.statistics().running_requests == 0
    manager.check_integrity()
