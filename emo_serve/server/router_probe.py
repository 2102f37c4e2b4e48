"""What the full router thinks of some text: one ordinary engine request, and the sums it leaves.

Who builds a pool on the running server asks this, and who chooses a pool for a prompt. The tokens
run inside a pool like any others, under a lease of their own; which experts compute is the pool's
business, but the router's mass is over all experts of a layer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from emo_serve.errors import EngineDead
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.vllm_plugin.contract import MASS_SLOTS, RouterMass

__all__ = ["LOW_PRIORITY", "RouterProbe"]

LOW_PRIORITY = 2**20
"""A priority behind everybody else's; requests have 0."""


class RouterProbe:
    """Run tokens through the engine for the router's mass.

    `run` serves them in a row of the pool table as one request that adds to a mass slot, and
    `read` returns and clears that slot. `max_tokens` is the longest text it takes.
    """

    def __init__(
        self,
        manager: ResidencyManager,
        run: Callable[[ExpertPool, int, Sequence[int], int, int], Awaitable[None]],
        read: Callable[[int], Awaitable[RouterMass]],
        max_tokens: int,
    ) -> None:
        self.max_tokens = max_tokens
        self._manager, self._run, self._read = manager, run, read
        self._free = list(range(MASS_SLOTS))
        self._dirty: set[int] = set()
        self._may_run = asyncio.Semaphore(MASS_SLOTS)

    async def mass(
        self, pool: ExpertPool, token_ids: Sequence[int], *, priority: int = 0
    ) -> RouterMass:
        """Return the full router's mass over these tokens, at most `max_tokens`, inside a pool.

        Waits while MASS_SLOTS others run, and for the pool; raises what a lease raises. A higher
        `priority` is served later.
        """
        async with self._may_run:
            slot = self._free.pop()
            try:
                if slot in self._dirty:  # after an abort, which the engine heard of before this
                    await self._read(slot)
                self._dirty.add(slot)
                async with self._manager.lease(pool) as lease:
                    await self._run(pool, lease.row, token_ids, slot, priority)
                mass = await self._read(slot)
                self._dirty.remove(slot)
            finally:
                self._free.append(slot)
        if mass.tokens < len(token_ids):
            raise EngineDead(f"the engine recorded {mass.tokens} tokens of {len(token_ids)}")
        return mass
