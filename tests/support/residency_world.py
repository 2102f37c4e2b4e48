"""A small world to test residency in: pools of two experts, clients, and operators."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import settings

from benchmarks.residency.virtual_time import run
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.residency.policy import LruPolicy
from emo_serve.residency.slots import SlotTable
from emo_serve.residency.statistics import PoolResidency
from tests.support.fake_engine import SLOT_BYTES, FakeEngine

NUM_EXPERTS = 8

PROFILES = {
    "quick": settings(max_examples=60, stateful_step_count=30, deadline=None),
    "long": settings(max_examples=2500, stateful_step_count=100, deadline=None),
}
PROFILE = PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "quick")]
"""How long the state machines run; the long profile takes minutes."""


def a_pool(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    """Return a pool of a model with one MoE layer and a dense one."""
    return ExpertPool(name, (LayerExperts(experts), None), temperature)


A, B, C, D = (a_pool(name, 2 * i, 2 * i + 1) for i, name in enumerate("abcd"))
AB, AC, BC = A.union(B), A.union(C), B.union(C)
BASE = a_pool("base", *range(NUM_EXPERTS))


def a_manager(
    engine: FakeEngine, *, slots: int = 4, rows: int = 9, **options: Any
) -> ResidencyManager:
    """Return a manager with room for two of the pools A to D and LRU, unless told otherwise."""
    table = SlotTable((NUM_EXPERTS, 0), slots)
    options.setdefault("policy", LruPolicy())
    return ResidencyManager(table, rows, engine, slot_bytes=SLOT_BYTES, **options)


async def loaded(engine: FakeEngine, *pools: ExpertPool, **options: Any) -> ResidencyManager:
    """Return a manager with these pools resident, coldest first; nothing counts as copied yet."""
    manager = a_manager(engine, **options)
    is_holding, engine.is_holding = engine.is_holding, False
    for pool in pools:
        await manager.load(pool)
    engine.is_holding = is_holding
    engine.operations.clear()
    manager.check_integrity()
    return manager


def status(manager: ResidencyManager, pool: ExpertPool) -> PoolResidency | None:
    """Return what the statistics say of a pool."""
    entries = {entry.content_hash: entry for entry in manager.statistics().pools}
    return entries.get(pool.content_hash)


def state(manager: ResidencyManager, pool: ExpertPool) -> str | None:
    """Return the state of a pool; None if it has no room and is not waited for."""
    entry = status(manager, pool)
    return entry.state if entry else None


def states(manager: ResidencyManager) -> dict[str, str]:
    """Return the state of every pool that has room or is waited for, by name."""
    return {entry.name: entry.state for entry in manager.statistics().pools}


class Client:
    """A request: wait for the pool, run until told to finish. Await `task` for its outcome."""

    def __init__(self, manager: ResidencyManager, pool: ExpertPool) -> None:
        self.manager = manager
        self.pool = pool
        self.lease: Lease | None = None
        self._finished = asyncio.Event()
        self.task = asyncio.create_task(self._request())

    @property
    def is_running(self) -> bool:
        """Tell whether the request has its lease."""
        return self.lease is not None

    async def finish(self) -> None:
        """Finish the request and wait until it has ended."""
        self._finished.set()
        await self.task

    async def leave(self) -> None:
        """Disconnect and wait until the request is cancelled."""
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.task.cancelled()

    async def _request(self) -> None:
        async with self.manager.lease(self.pool) as self.lease:
            try:
                await self._finished.wait()
            finally:
                self.lease = None


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop whose clock jumps: deadlines cost nothing, a hang is an error."""

    @functools.wraps(test)
    def call(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return call


def now() -> float:
    """Return the running loop's time: virtual in a test in virtual time."""
    return asyncio.get_running_loop().time()
