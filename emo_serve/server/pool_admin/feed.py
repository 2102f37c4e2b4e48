"""A stream of what happens to pools and slots, for any number of readers.

While anybody reads, a cheap value is compared a few times per second. When it has changed, one
snapshot is made and written once, as bytes that all readers get. A snapshot takes longer the more
pools there are, so the pause before the next one is a multiple of what the last one took: however
busy the server is, snapshots take a fixed share of one core at most. A slow reader misses what was
meanwhile, and gets the newest.

Server-sent events, each with one JSON document:

    event: pools    the answer of GET /v1/pools, when a pool, a request or a count has changed
    event: slots    the answer of GET /v1/residency, when a slot has changed
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from emo_serve.errors import Unavailable
from emo_serve.server.pool_admin.schema import list_of
from emo_serve.server.pool_admin.slot_schema import slot_map_answer
from emo_serve.server.pool_admin.status import PoolStatuses

__all__ = ["ResidencyFeed"]

_LOOK_SECONDS = 0.25
_PAUSE_SECONDS = 1.0  # between two snapshots, at least
_COST_FACTOR = 200  # and at least as many times what the last one took: 0.5 % of a core
_SIGN_OF_LIFE_SECONDS = 15.0
_MAX_READERS = 256


@dataclass
class _Topic:
    """One kind of event: the newest, and what tells whether there is a newer one."""

    name: str
    version: Callable[[], object]
    make: Callable[[], str]
    number: int = 0  # of events made
    event: bytes = b""
    seen: object = field(default_factory=object)

    def is_stale(self) -> bool:
        version = self.version()
        is_stale = version != self.seen
        self.seen = version
        return is_stale

    def renew(self) -> None:
        self.event = f"event: {self.name}\ndata: {self.make()}\n\n".encode()
        self.number += 1


class ResidencyFeed:
    """Tell readers what happens; nothing is done while there are none.

    Once `is_ending` says so, every stream ends.
    """

    def __init__(
        self,
        statuses: PoolStatuses,
        is_ending: Callable[[], bool] = lambda: False,
        *,
        look_seconds: float = _LOOK_SECONDS,
        pause_seconds: float = _PAUSE_SECONDS,
        sign_of_life_seconds: float = _SIGN_OF_LIFE_SECONDS,
        max_readers: int = _MAX_READERS,
    ) -> None:
        self._topics = (
            _Topic("slots", statuses.slots_version, lambda: _slots(statuses)),
            _Topic("pools", statuses.version, lambda: _pools(statuses)),
        )
        self._look_seconds, self._pause_seconds = look_seconds, pause_seconds
        self._sign_of_life_seconds, self._max_readers = sign_of_life_seconds, max_readers
        self._news = asyncio.Event()  # set once, then replaced
        self._looking: asyncio.Task[None] | None = None
        self._is_ending, self._has_ended = is_ending, False
        self._not_before = 0.0  # on the loop's clock: the next snapshot
        self.num_readers = 0

    def check_room(self) -> None:
        """Raise Unavailable if there are too many readers already."""
        if self.num_readers >= self._max_readers:
            raise Unavailable(
                f"{self._max_readers} clients follow this server's pools, and no more may; close"
                " one, or ask GET /v1/pools and GET /v1/residency from time to time"
            )

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield events: first the state as it is, then what is new, until the server ends."""
        self.num_readers += 1
        if self._looking is None:
            self._renew()
            self._looking = asyncio.create_task(self._look())
        try:
            told = dict.fromkeys((topic.name for topic in self._topics), 0)
            while not self._has_ended:
                next_news = self._news
                news = [topic for topic in self._topics if topic.number > told[topic.name]]
                told |= {topic.name: topic.number for topic in news}
                if news:
                    yield b"".join(topic.event for topic in news)
                elif not await self._comes(next_news):
                    yield b": nothing new\n\n"
        finally:
            self.num_readers -= 1
            if not self.num_readers and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _comes(self, news: asyncio.Event) -> bool:
        """Wait for news; return False if there were none for so long that readers should hear."""
        try:
            async with asyncio.timeout(self._sign_of_life_seconds):
                await news.wait()
        except TimeoutError:
            return False
        return True

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_ending():
            await asyncio.sleep(self._look_seconds)
            if loop.time() >= self._not_before:
                self._renew()
        self._has_ended = True
        self._tell()

    def _renew(self) -> None:
        """Make the events that are not the newest any more, and decide when to look again."""
        start = time.perf_counter()
        stale = [topic for topic in self._topics if topic.is_stale()]
        for topic in stale:
            topic.renew()
        if stale:
            pause = max(self._pause_seconds, _COST_FACTOR * (time.perf_counter() - start))
            self._not_before = asyncio.get_running_loop().time() + pause
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _pools(statuses: PoolStatuses) -> str:
    return list_of(statuses.overview(), experts=False).model_dump_json(exclude_unset=True)


def _slots(statuses: PoolStatuses) -> str:
    return slot_map_answer(statuses.slot_map()).model_dump_json()
