"""Elastic pools: a request begins with the part of its pool that is there, and the rest follows.

A pool with scores is a family of sizes, each part of the next (`Nested`). A request whose pool is
not resident begins at the largest size that is, or waits for the smallest that will do. Meanwhile
`Growth` loads the pool in steps, the best experts first; each step is a pool of its own, so what
has come can serve at once. The manager decides which size a request begins with, the queue which
size of a pool may stay when the pool must go.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from emo_serve.pools.pool import ExpertPool

__all__ = ["Growth", "Nested", "NestedSizes"]

logger = logging.getLogger(__name__)

_MOST_STEPS = 8


@dataclass(frozen=True)
class Nested:
    """A pool and its smaller sizes: `at(k)` for each `k` of `sizes`, every one part of the next.

    `sizes` ascends without gaps, is not empty, and its last is part of `whole`.
    """

    whole: ExpertPool
    sizes: range
    at: Callable[[int], ExpertPool]

    @property
    def smallest(self) -> ExpertPool:
        """Return the smallest size that may serve."""
        return self.at(self.sizes[0])

    def largest(self, is_possible: Callable[[ExpertPool], bool]) -> int | None:
        """Return the largest size for which that holds; where it holds, it holds for less."""
        low, high = self.sizes.start - 1, self.sizes.stop - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_possible(self.at(middle)) else (low, middle - 1)
        return low if low in self.sizes else None

    def steps(self, begun: int | None) -> Iterator[ExpertPool]:
        """Return the sizes to load after `begun` (None: nothing) on the way to the whole pool."""
        step = max(self.sizes[0], math.ceil(self.sizes.stop / _MOST_STEPS))
        first = self.sizes[0] if begun is None else begun + step
        yield from (self.at(k) for k in range(first, self.sizes.stop, step))
        yield self.whole


NestedSizes = Callable[[ExpertPool], Nested | None]
"""Returns a pool's smaller sizes; None for a pool that has none."""


class Growth:
    """Load pools in steps behind the requests that began without all of them; one task per pool.

    `load` makes one size resident, behind everything that requests wait for. What it raises ends a
    growth: the next request begins another.
    """

    def __init__(self, load: Callable[[ExpertPool], Awaitable[object]]) -> None:
        self._load = load
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the whole pool's content hash

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, nested: Nested, begun: int | None) -> None:
        """Grow a pool from the size `begun` on; a no-op while it grows already."""
        key = nested.whole.content_hash
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._grow(nested, begun))

    def stop(self, key: str) -> None:
        """Load no more of a pool; what is there stays."""
        if (task := self._tasks.pop(key, None)) is not None:
            task.cancel()

    def stop_all(self) -> None:
        """Load no more of any pool."""
        for key in list(self._tasks):
            self.stop(key)

    async def _grow(self, nested: Nested, begun: int | None) -> None:
        try:
            for pool in nested.steps(begun):
                await self._load(pool)
        except Exception as error:  # whatever it is, the requests of this pool are served
            logger.info("pool %s does not grow for now: %s", nested.whole.name, error)
        finally:
            if self._tasks.get(nested.whole.content_hash) is asyncio.current_task():
                del self._tasks[nested.whole.content_hash]
