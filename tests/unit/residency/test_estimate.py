"""Retry-After: a client that obeys is served at its second try in most cases."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from emo_serve.errors import LoadDeadlineExceeded, TooManyWaiting
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import A, B, C, Client, D, in_virtual_time, loaded, now


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
