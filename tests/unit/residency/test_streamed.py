"""Pools too large for the slots, where the engine can stream them: a row, no slots, no waiting."""

from __future__ import annotations

import asyncio

import pytest

from emo_serve.errors import PoolLoadFailed, PoolTooLarge
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import (
    AB,
    BASE,
    A,
    B,
    C,
    Client,
    D,
    a_manager,
    a_pool,
    in_virtual_time,
    loaded,
    state,
)

LARGE = a_pool("large", 0, 2, 3, 5, 7)


@in_virtual_time
async def test_a_streamed_pool_begins_at_once_whatever_is_in_the_slots() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, A, B, may_stream=True)
    leased = Client(manager, A), Client(manager, B)
    waiting = Client(manager, C)  # all slots are leased
    await settle()
    assert not waiting.is_running and state(manager, C) == "waiting"
    base = Client(manager, BASE)
    await settle()
    assert base.lease is not None and (base.lease.row, base.lease.is_hit) == (0, True)
    assert state(manager, BASE) == "streamed" and engine.copied == []
    assert engine.table[0][0] == BASE.expert_ids
    assert manager.is_streamed(BASE) and not manager.is_resident(BASE) and manager.would_hit(BASE)
    manager.check_integrity()
    for client in leased:
        await client.finish()
    await settle()
    assert waiting.is_running, "a streamed pool is in nobody's way"
    await waiting.finish()
    await base.finish()
    manager.check_integrity()


@in_virtual_time
async def test_slots_are_counted_without_streamed_pools() -> None:
    manager = await loaded(FakeEngine(), BASE, LARGE, A, may_stream=True)
    stats = manager.statistics()
    assert (stats.used_slots, stats.free_slots) == (2, 2)
    client = Client(manager, BASE)
    await settle()
    assert manager.statistics().leased_slots == 0
    assert manager.fits_now(B) and manager.num_fitting([B, C]) == 1
    await client.finish()


@in_virtual_time
async def test_a_streamed_pool_takes_a_row_and_gives_it_up_for_another() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, LARGE, A, may_stream=True, rows=3)
    assert state(manager, LARGE) == "streamed"
    await manager.load(B)
    assert (state(manager, LARGE), state(manager, A)) == (None, "resident")
    client = Client(manager, LARGE)
    await settle()
    assert client.is_running and state(manager, A) is None, "the coldest"
    await client.finish()
    await manager.evict(LARGE)
    assert state(manager, LARGE) is None
    manager.check_integrity()


@in_virtual_time
async def test_what_is_not_there_to_stay_cannot_be_pinned() -> None:
    manager = a_manager(FakeEngine(), may_stream=True)
    with pytest.raises(PoolTooLarge, match="'base' can never be resident"):
        await manager.load(BASE, pin=True)
    manager.check_servable(BASE)
    with pytest.raises(PoolTooLarge):
        manager.check_servable(BASE, pinned=True)


@in_virtual_time
async def test_pools_that_fit_are_never_streamed() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, AB, may_stream=True)
    assert not manager.is_streamed(AB) and manager.is_resident(AB)
    waiting = Client(manager, AB)
    await settle()
    assert waiting.is_running and state(manager, D) is None
    await waiting.finish()


@in_virtual_time
async def test_an_engine_that_cannot_stream_refuses() -> None:
    manager = a_manager(FakeEngine())
    assert not manager.is_streamed(BASE)
    with pytest.raises(PoolTooLarge):
        manager.check_admissible(BASE)
    with pytest.raises(PoolTooLarge):
        async with asyncio.timeout(1), manager.lease(BASE):
            pass


@in_virtual_time
async def test_what_cannot_be_read_is_found_before_the_engine_steps() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, BASE, A, may_stream=True)
    engine.unreadable = {(0, 5)}
    with pytest.raises(PoolLoadFailed, match="expert 5 of layer 0 is unreadable"):
        async with manager.lease(BASE):
            pass
    async with manager.lease(A):
        pass
    engine.unreadable.clear()
    async with manager.lease(BASE) as lease:
        assert lease.row == 0
    manager.check_integrity()
