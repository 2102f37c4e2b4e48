"""No request starves: the bound that `queue` claims, in virtual time, and that it needs closing.

Requests last at most REQUEST seconds and a load LOAD seconds; clients ask again at once, for ever.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from benchmarks.residency.virtual_time import run
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.policy import POLICIES, make_policy
from emo_serve.residency.queue import LoadQueue
from tests.support.fake_engine import FakeEngine
from tests.support.residency_world import A, B, C, D, a_manager, a_pool, now

REQUEST, LOAD = 10.0, 3.0
EPSILON = 1e-6
CLIENTS_PER_POOL = 3  # so that a pool is never idle of its own accord


@dataclass(frozen=True)
class Wait:
    """How long one request waited, and how many places were ahead of it when it came."""

    seconds: float
    ahead: int

    @property
    def share(self) -> float:
        """Return the wait as a share of what the places up to this one may cost."""
        return self.seconds / ((self.ahead + 1) * (REQUEST + LOAD))


@asynccontextmanager
async def endless_load(
    manager: ResidencyManager, pools: Sequence[ExpertPool], seed: int
) -> AsyncIterator[list[Wait]]:
    """Keep clients asking for every pool; yield the list to which their waits are added."""
    chance = random.Random(seed)
    waits: list[Wait] = []

    async def client(pool: ExpertPool) -> None:
        while True:
            waits.append(await one_request(manager, pool, chance.uniform(0.2, 1.0) * REQUEST))

    tasks = [asyncio.create_task(client(pool)) for pool in pools for _ in range(CLIENTS_PER_POOL)]
    try:
        yield waits
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        manager.check_integrity()


async def one_request(manager: ResidencyManager, pool: ExpertPool, seconds: float) -> Wait:
    keys = [pending.key for pending in manager._queue.pending]
    ahead = keys.index(pool.content_hash) if pool.content_hash in keys else len(keys)
    start = now()
    async with manager.lease(pool):
        wait = Wait(now() - start, ahead)
        await asyncio.sleep(seconds)
    return wait


def a_loaded_manager(policy: str = "lru") -> ResidencyManager:
    return a_manager(
        FakeEngine(load_seconds=LOAD),
        policy=make_policy(policy),
        load_deadline_seconds=1e6,
        clock=now,
    )


def wait_for_c(seed: int, policy: str = "lru") -> Wait:
    """Return what a request for c waits under endless load on a and b, with room for two."""

    async def program() -> Wait:
        manager = a_loaded_manager(policy)
        async with endless_load(manager, (A, B), seed):
            await asyncio.sleep(50.0 + seed)
            assert manager.statistics().running_requests == 2 * CLIENTS_PER_POOL
            async with asyncio.timeout(1000.0):
                return await one_request(manager, C, 1.0)

    return run(program())


def waits_of_all(num_pools: int, seed: int, policy: str) -> list[Wait]:
    """Return the waits under endless load on all of these pools, with room for two."""

    async def program() -> list[Wait]:
        manager = a_loaded_manager(policy)
        pools = [A, B, C, D, a_pool("e", 0, 7), a_pool("f", 2, 5)][:num_pools]
        async with endless_load(manager, pools, seed) as waits:
            await asyncio.sleep(2000.0)
            return list(waits)

    return run(program())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_under_endless_load_a_third_pool_waits_one_request_and_one_load(
    seed: int, policy: str
) -> None:
    wait = wait_for_c(seed, policy)
    assert wait.ahead == 0
    assert LOAD < wait.seconds <= REQUEST + LOAD + EPSILON


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_pools", [3, 4, 6])
def test_with_endless_load_on_all_a_wait_is_the_queue_ahead(num_pools: int, policy: str) -> None:
    waits = waits_of_all(num_pools, seed=num_pools, policy=policy)
    assert len(waits) > 200
    assert max(wait.ahead for wait in waits) >= num_pools - 3
    for wait in waits:
        assert wait.seconds <= (wait.ahead + 1) * (REQUEST + LOAD) + EPSILON


def test_without_closing_it_would_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above can fail."""
    monkeypatch.setattr(LoadQueue, "_close_for", lambda *args: None)
    with pytest.raises(TimeoutError):
        wait_for_c(seed=0)


def test_a_pool_that_passed_costs_the_first_at_most_its_load() -> None:
    """Five slots: the small pool passes, since there is one beside what the first will take."""

    async def program() -> float:
        engine = FakeEngine(load_seconds=LOAD)
        manager = a_manager(engine, slots=5, load_deadline_seconds=1e6, clock=now)
        await manager.load(A)
        running = asyncio.create_task(one_request(manager, A, REQUEST))
        await asyncio.sleep(0)
        first = asyncio.create_task(one_request(manager, a_pool("first", 2, 3, 4, 5), 1.0))
        await asyncio.sleep(REQUEST - 0.5)
        await manager.load(a_pool("small", 6))
        await running
        return (await first).seconds

    assert run(program()) == REQUEST - 0.5 + 2 * LOAD


def test_closed_pools_are_served_again_in_their_turn() -> None:
    """One request for c costs a and b their turn once, not for good."""

    async def program() -> list[Wait]:
        manager = a_loaded_manager()
        async with endless_load(manager, (A, B), seed=1) as waits:
            await asyncio.sleep(50.0)
            await one_request(manager, C, REQUEST)
            waits.clear()
            await asyncio.sleep(100.0)
            assert {entry.name for entry in manager.statistics().pools} == {"a", "b"}
            return list(waits)

    waits = run(program())
    assert max(wait.seconds for wait in waits) <= 2 * (REQUEST + LOAD) + EPSILON
    assert sum(wait.seconds for wait in waits[-20:]) == 0.0
