"""The full router's mass on some text: one ordinary engine request, and the sums it leaves behind.

Building a pool on the running server and choosing a pool for a prompt both use this. The tokens run
inside a pool like any others, under their own lease. Only the pool's experts compute, but the
router's mass covers all experts of a layer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from emo_serve.errors import EngineDead
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.vllm_plugin.contract import MASS_SLOTS, RouterMass

__all__ = ["LOW_PRIORITY", "RouterProbe"]

LOW_PRIORITY = 2**20
"""A priority behind that of all requests, which have 0."""


class RouterProbe:
    """Run tokens through the engine and return the router's mass on them.

    `run` takes a lease, token ids, mass slot and priority: it runs the ids in the pool as one
    request that adds to that mass slot. `read` returns and clears a mass slot. `max_tokens` is
    the longest text that `mass` accepts.
    """

    def __init__(
        self,
        manager: ResidencyManager,
        run: Callable[[Lease, Sequence[int], int, int], Awaitable[None]],
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

        Waits for the pool, and while MASS_SLOTS other probes run. A higher `priority` is served
        later. Raises what a lease raises, and EngineDead if the engine recorded too few tokens.
        """
        async with self._may_run:
            slot = self._free.pop()
            try:
                if slot in self._dirty:  # its last probe was aborted, as the engine was told before
                    await self._read(slot)
                self._dirty.add(slot)
                async with self._manager.lease(pool, is_own=True) as lease:
                    await self._run(lease, token_ids, slot, priority)
                mass = await self._read(slot)
                self._dirty.remove(slot)
            finally:
                self._free.append(slot)
        if mass.tokens < len(token_ids):
            raise EngineDead(
                f"the engine recorded router mass for {mass.tokens} of {len(token_ids)} tokens"
            )
        return mass
