"""Stand-ins shared by the tests: an engine whose operations end when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from emo_serve.errors import PoolLoadFailed
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.ports import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds

SLOT_BYTES = 64


@dataclass
class Operation:
    """One call by the manager; held until `release` or `fail`."""

    row: int
    expert_ids: tuple[tuple[int, ...], ...]
    temperature: float
    copies: tuple[Copy, ...]
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def release(self) -> None:
        """Let the operation succeed."""
        self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Let the operation raise."""
        self.done.set_exception(error)


class FakeEngine:
    """A PoolEngine that records the calls it gets.

    With `is_holding` every operation stays in `held` until the test releases it; otherwise it ends
    after `load_seconds` (on the loop's clock) if it copies, or raises `failure` if that is set.
    `slab` and `table` are what a worker would hold: a slot that is being written holds None.
    """

    def __init__(self, *, is_holding: bool = False, load_seconds: float = 0.0) -> None:
        self.is_holding = is_holding
        self.load_seconds = load_seconds
        self.failure: Exception | None = None
        self.unreadable: set[tuple[int, int]] = set()  # (layer, expert)
        self.operations: list[Operation] = []
        self.held: list[Operation] = []
        self.slab: dict[tuple[int, int], int | None] = {}  # (layer, slot) -> expert
        self.slot_of: dict[tuple[int, int], int] = {}  # (layer, expert) -> slot, as published
        self.table: dict[int, tuple[ExpertIds, float]] = {}

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Refuse the experts the test named."""
        for copy in copies:
            if (copy.layer, copy.expert) in self.unreadable:
                raise PoolLoadFailed(f"expert {copy.expert} of layer {copy.layer} is unreadable")

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Record the copies and the row; slab and table change when the operation is released."""
        ids = tuple(map(tuple, expert_ids))
        for copy in copies:
            self.slab[copy.layer, copy.slot] = None
        await self._run(Operation(row, ids, temperature, tuple(copies)))
        for copy in copies:
            self.slab[copy.layer, copy.slot] = copy.expert
            self.slot_of[copy.layer, copy.expert] = copy.slot
        self.table[row] = (ids, temperature)
        size = SLOT_BYTES * len(copies)
        num_experts = sum(map(len, ids))
        return LoadReport(num_experts, len(copies), 0, size, size, self.load_seconds)

    def serves(self, row: int, pool: ExpertPool) -> bool:
        """Tell whether a request on this row would be computed with just this pool's experts."""
        if self.table.get(row) != (pool.expert_ids, pool.router_temperature):
            return False
        return all(
            self.slab.get((layer, self.slot_of.get((layer, expert), -1))) == expert
            for layer, experts in enumerate(pool.expert_ids)
            for expert in experts
        )

    @property
    def copied(self) -> list[int]:
        """Return the experts copied, in the order of the loads."""
        return [copy.expert for operation in self.operations for copy in operation.copies]

    async def next_held(self) -> Operation:
        """Return the oldest operation still held, once there is one."""
        while not self.held:
            await asyncio.sleep(0)
        return self.held[0]

    async def _run(self, operation: Operation) -> None:
        self.operations.append(operation)
        if not self.is_holding:
            if operation.copies and self.load_seconds:
                await asyncio.sleep(self.load_seconds)
            if self.failure is not None:
                raise self.failure
            return
        self.held.append(operation)
        try:
            await operation.done
        finally:
            self.held.remove(operation)


async def settle() -> None:
    """Run every task that can run now; nothing here waits for a clock."""
    for _ in range(20):
        await asyncio.sleep(0)
