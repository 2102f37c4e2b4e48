"""Retry-After: a client that obeys is served at its second try in most cases."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from emo_serve.errors import LoadDeadlineExceeded, TooManyWaiting
from emo_serve.residency.records import Purpose
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import A, B, C, Client, D, a_pool, in_virtual_time, loaded, now


@in_virtual_time
async def test_the_leases_that_must_end_are_counted_not_only_the_load() -> None:
    clock = asyncio.get_running_loop().time
    manager = await loaded(FakeEngine(load_seconds=0.5), A, slots=2, max_waiting=1, clock=clock)
    async with manager.lease(A):
        await asyncio.sleep(4)
    running, waiting = Client(manager, A), Client(manager, B)
    await asyncio.sleep(1)  # a has 3 s to go, then b is loaded
    with pytest.raises(TooManyWaiting) as caught:
        manager.check_admissible(C)
    assert caught.value.retry_after_seconds == 4
    await running.finish()
    await asyncio.sleep(1)
    await waiting.finish()
    await settle()


@pytest.mark.parametrize("service_seconds", [1.0, 3.0])
@in_virtual_time
async def test_a_client_that_obeys_is_served_at_its_second_try(service_seconds: float) -> None:
    clock = asyncio.get_running_loop().time
    manager = await loaded(FakeEngine(load_seconds=0.4), A, B, slots=4, max_waiting=6, clock=clock)
    tries: list[int] = []

    async def client(number: int) -> None:
        await asyncio.sleep(number * service_seconds / 6)
        for attempt in range(1, 30):
            try:
                async with manager.lease((A, B, C, D)[number % 4]):
                    tries.append(attempt)
                    await asyncio.sleep(service_seconds * (0.8 + number % 5 / 10))
                return
            except (TooManyWaiting, LoadDeadlineExceeded) as error:
                await asyncio.sleep(error.retry_after_seconds)

    async with asyncio.TaskGroup() as clients:
        for number in range(80):
            clients.create_task(client(number))
    refused = [attempt for attempt in tries if attempt > 1]
    assert len(tries) == 80
    assert len(refused) >= 5
    assert refused.count(2) >= 0.7 * len(refused), (Counter(tries), now())


@in_virtual_time
async def test_growth_takes_no_clients_turn() -> None:
    """Neither one that waits between clients, nor one that finds the queue full."""
    clock = asyncio.get_running_loop().time

    async def retry_after(*, is_growing: bool) -> int:
        engine = FakeEngine(load_seconds=5)
        manager = await loaded(engine, A, slots=2, max_waiting=2, clock=clock)
        clients, growths = [Client(manager, A), Client(manager, B)], []
        for growing in ([C], [a_pool("e", 1, 2)] * 3):
            await settle()
            for pool in growing if is_growing else []:
                growths.append(asyncio.create_task(manager._queue.acquire(pool, Purpose.GROW)))
            await settle()
            clients.append(Client(manager, D))
        with pytest.raises(TooManyWaiting) as caught:
            manager.check_admissible(a_pool("f", 3, 4))
        for growth in growths:
            growth.cancel()
        await asyncio.gather(*growths, return_exceptions=True)
        for client in clients[:-1]:
            await client.finish()
        with pytest.raises(TooManyWaiting):
            await clients[-1].task
        return caught.value.retry_after_seconds

    assert await retry_after(is_growing=True) == await retry_after(is_growing=False)
