"""Stand-ins shared by the tests: an engine whose operations end when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from emo_serve.residency.manager import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds

SLOT_BYTES = 64


@dataclass
class Operation:
    """One call of the manager's; held until `release` or `fail`."""

    kind: str
    copies: tuple[Copy, ...] = ()
    row: int | None = None
    expert_ids: tuple[tuple[int, ...], ...] = ()
    temperature: float = 1.0
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
    """A PoolEngine that remembers what it was told.

    With `is_holding` every operation stays in `held` until the test releases it; otherwise it ends
    at once, or raises `failure` if that is set. `slab` and `table` are what a worker would hold.
    """

    def __init__(self, *, is_holding: bool = False) -> None:
        self.is_holding = is_holding
        self.failure: Exception | None = None
        self.operations: list[Operation] = []
        self.held: list[Operation] = []
        self.slab: dict[tuple[int, int], int] = {}  # (layer, slot) -> expert
        self.table: dict[int, tuple[ExpertIds, float]] = {}
        self.on_publish: Callable[[int], None] = lambda row: None

    async def load_experts(self, copies: Sequence[Copy]) -> LoadReport:
        """Record the copies; the slab changes when the operation is released."""
        await self._run(Operation("load", copies=tuple(copies)))
        for copy in copies:
            self.slab[copy.layer, copy.slot] = copy.expert
        return LoadReport(bytes_read=SLOT_BYTES * len(copies), seconds=0.0)

    async def publish_pool(self, row: int, expert_ids: ExpertIds, temperature: float) -> None:
        """Record the row; the table changes when the operation is released."""
        ids = tuple(map(tuple, expert_ids))
        self.on_publish(row)
        await self._run(Operation("publish", row=row, expert_ids=ids, temperature=temperature))
        self.table[row] = (ids, temperature)

    @property
    def num_published(self) -> int:
        """Return how many rows were ever asked for."""
        return sum(operation.kind == "publish" for operation in self.operations)

    async def next_held(self) -> Operation:
        """Return the oldest operation still held, once there is one."""
        while not self.held:
            await asyncio.sleep(0)
        return self.held[0]

    async def _run(self, operation: Operation) -> None:
        self.operations.append(operation)
        if not self.is_holding:
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
