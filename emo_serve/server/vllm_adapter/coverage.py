"""Coverage of each engine request: the share of the full router's mass inside the request's pool.

The workers sum it up under account numbers that the front end gives out, one an engine request, and
clear what they hand over. So reads never overlap, the sums of one account from several reads are
added here, and a read that has begun is never abandoned, whoever asked for it. An account that is
closed is final after the next read that begins: then it is observed and forgotten, and what the
engine still routes for it (a step that was under way when its client left) is dropped.
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
    total: CoverageSum | None = None
    is_closed: bool = False

    def add(self, found: CoverageSum) -> None:
        total = found if self.total is None else self.total + found
        self.total = total if total.tokens else None


class CoverageBook:
    """Keep the accounts of engine requests; `run` reads the workers while there are any.

    `read` returns what the workers have summed up since the last read, by account; `observe` is
    told the pool and the coverage of each request that has ended, once, unless nothing of it was
    routed.
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
        """Return how many accounts are open, or closed and not read since."""
        return len(self._accounts)

    def open(self, pool: str) -> int:
        """Return the number of a new account, from 1; none is used twice."""
        number = next(self._numbers)
        self._accounts[number] = _Account(pool)
        self._has_accounts.set()
        return number

    def close(self, account: int) -> None:
        """Note that the request has ended; a no-op for an account that is forgotten."""
        if (entry := self._accounts.get(account)) is not None:
            entry.is_closed = True

    async def result(self, account: int) -> CoverageSum | None:
        """Close an account, read now, and return its sum.

        None if nothing was routed, or if the engine has died and cannot be asked any more.
        """
        entry = self._accounts[account]
        entry.is_closed = True
        try:
            await self._read_anew()
        except EngineDead:
            return None
        return entry.total

    async def run(self) -> None:
        """Read for as long as there are accounts, for ever; ends quietly with the engine."""
        with suppress(EngineDead):
            while True:
                await self._has_accounts.wait()
                await self._read_anew()
                await asyncio.sleep(self._period_seconds)

    async def _read_anew(self) -> None:
        """Return when a read has ended that began after this call; callers share one."""
        if self._reading is not None and not self._reading.done():
            await asyncio.wait((self._reading,))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._take())
            self._reading.add_done_callback(_look_at)
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
        if not self._accounts:
            self._has_accounts.clear()


def _look_at(reading: asyncio.Task[None]) -> None:
    """Look at a read's error, whose caller may have gone, before asyncio complains of it."""
    if not reading.cancelled():
        reading.exception()
