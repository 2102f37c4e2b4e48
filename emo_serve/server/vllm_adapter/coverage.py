"""Coverage of each engine request: the share of the full router's mass inside the request's pool.

The workers sum it up under account numbers that the front end assigns, one per engine request, and
clear the sums when they are read. So reads never overlap, sums of one account from several reads
are added here, and a read that has begun is always completed, even if its caller is gone. A closed
account is final after the next read that begins: it is then observed and forgotten. Tokens that the
engine still routes for it (in a step that was running when its client left) are dropped.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from emo_serve.errors import EngineDead
from emo_serve.server.coverage import CoverageSum, share_of

__all__ = ["CoverageBook"]

_PERIOD_SECONDS = 1.0  # a read is one short call between two steps of the engine


@dataclass
class _Account:
    pool: str
    on_final: Callable[[CoverageSum | None], None]
    total: CoverageSum | None = None
    is_closed: bool = False

    def add(self, found: CoverageSum) -> None:
        total = found if self.total is None else self.total + found
        self.total = total if total.tokens else None


class CoverageBook:
    """Keep the accounts of engine requests; `run` reads the workers while there are any.

    `read` returns the workers' sums since the last read, by account. `observe` is called once per
    ended request with its pool and its coverage, unless none of its tokens was routed.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[int, CoverageSum]]],
        observe: Callable[[str, float], None],
        *,
        period_seconds: float = _PERIOD_SECONDS,
    ) -> None:
        self._read = read
        self._observe = observe
        self._period_seconds = period_seconds
        self._numbers = itertools.count(1)
        self._accounts: dict[int, _Account] = {}
        self._has_accounts = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    @property
    def num_accounts(self) -> int:
        """Return how many accounts are open, or closed but not read since."""
        return len(self._accounts)

    def open(
        self, pool: str, on_final: Callable[[CoverageSum | None], None] = lambda total: None
    ) -> int:
        """Open an account and return its number, which is at least 1 and never used again.

        `on_final` gets its sum once nothing can be added: None if no token was routed.
        """
        number = next(self._numbers)
        self._accounts[number] = _Account(pool, on_final)
        self._has_accounts.set()
        return number

    def close(self, account: int) -> None:
        """Note that the request has ended; a no-op for an account already forgotten."""
        if (entry := self._accounts.get(account)) is not None:
            entry.is_closed = True

    async def result(self, account: int) -> CoverageSum | None:
        """Close an account, read now, and return its sum.

        None if no token was routed, or if the engine has died.
        """
        entry = self._accounts[account]
        entry.is_closed = True
        try:
            await self._read_anew()
        except EngineDead:
            return None
        return entry.total

    async def run(self) -> None:
        """Read the workers while there are accounts, forever; returns if the engine dies."""
        with suppress(EngineDead):
            while True:
                await self._has_accounts.wait()
                await self._read_anew()
                await asyncio.sleep(self._period_seconds)

    async def _read_anew(self) -> None:
        """Wait for a read that begins after this call; several callers share one read."""
        if self._reading is not None and not self._reading.done():
            await asyncio.wait((self._reading,))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._take())
            self._reading.add_done_callback(_retrieve_error)
        await asyncio.shield(self._reading)

    async def _take(self) -> None:
        closed = [number for number, entry in self._accounts.items() if entry.is_closed]
        for number, found in (await self._read()).items():
            if (entry := self._accounts.get(number)) is not None:
                entry.add(found)
        for number in closed:
            entry = self._accounts.pop(number)
            if entry.total is not None:
                self._observe(entry.pool, share_of(entry.total))
            entry.on_final(entry.total)
        if not self._accounts:
            self._has_accounts.clear()


def _retrieve_error(reading: asyncio.Task[None]) -> None:
    """Retrieve a read's error: if no caller is left to do so, asyncio would complain."""
    if not reading.cancelled():
        reading.exception()
