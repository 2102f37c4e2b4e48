"""One replica's part in the fleet's pools: one truth, wherever a change arrives.

A change arrives at one replica, which makes it as a single server would, and answers once the
others have heard of it. News name a pool by its document; a replica that has the same content does
nothing. A replica that joins hears everything before it is ready, and asks again from time to time,
since a change may be made just while it joins. Files in --pools are written only where a change
arrives.

A pin on N replicas is held by the first N of the pool's order that run, whichever these are. What
clients ask about pools is in `fleet_routes`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from starlette.types import ASGIApp

from emo_serve.cluster.pins import EVERYWHERE, holders
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.cluster.shared import News, SharedPools, Stamp
from emo_serve.errors import EmoServeError, UnknownPool
from emo_serve.names import pools_of
from emo_serve.pools.document import format_pool, parse_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.strict_json import parse_json
from emo_serve.ray_cluster.local_requests import LocalAnswer, LocalRequest, ask_app
from emo_serve.server.pool_admin.service import PoolService

__all__ = ["FleetMember", "Peers"]

logger = logging.getLogger(__name__)

_HEAR_SECONDS = 15.0
_AGAIN_SECONDS = (1.0, 3.0, 10.0)
_STEADY_SECONDS = 30.0


class Peers(Protocol):
    """The replicas that take requests now, this one included once it does."""

    async def ask(
        self, request: LocalRequest, replicas: Sequence[str] | None = None
    ) -> dict[str, LocalAnswer]:
        """Have the named replicas, None for all, answer a request; those that die are left out."""

    async def hear(self, news: Sequence[News]) -> None:
        """Tell news to all, and wait until they have acted on them."""

    async def tell(self, stamps: Sequence[Stamp]) -> list[Sequence[News]]:
        """Return what each knows beyond the news with these stamps."""

    async def names(self) -> list[str]:
        """Return the names of all."""


class FleetMember:
    """Keep one replica's pools as the fleet's."""

    def __init__(self, name: str, peers: Peers) -> None:
        self.name = name
        self._peers = peers
        self._shared = SharedPools(name)
        self._rendezvous = Rendezvous()
        self._one_hearing = asyncio.Lock()
        self._seen: dict[str, ExpertPool] = {}
        self._untold: list[News] = []
        self._running: frozenset[str] = frozenset()  # when pins were last looked at
        self._app: ASGIApp | None = None
        self._key: str | None = None
        self._service: PoolService | None = None

    async def join(self, service: PoolService, app: ASGIApp, key: str | None = None) -> None:
        """Take over the fleet's pools; call it before the first request.

        `app` is the whole app with FleetRoutes in it, and `key` an operator's, if it needs one.
        """
        self._service, self._app, self._key = service, app, key
        self._seen = self._defined()
        await self.catch_up()

    @property
    def service(self) -> PoolService:
        """Return what this replica does with pools, once it has joined."""
        assert self._service is not None
        return self._service

    # -- what the other replicas call --

    async def ask(self, request: LocalRequest) -> LocalAnswer:
        """Answer a request by this replica alone."""
        assert self._app is not None
        return await ask_app(self._app, request, self._key)

    async def hear(self, news: Sequence[News]) -> None:
        """Act on news that are new here."""
        async with self._one_hearing:
            self._note_changes()
            for item in news:
                # of two changes made at once, the file may have either
                writes = self._shared.overtakes_mine(item)
                if self._shared.take(item):
                    await self._act(item, writes=writes)

    def tell(self, stamps: Sequence[Stamp]) -> Sequence[News]:
        """Return what is known here beyond the news with these stamps."""
        self._note_changes()
        return self._shared.lacking(stamps)

    # -- changes made here --

    async def spread(self) -> None:
        """Tell the others what is new here, and wait for them; the slow ones hear of it later."""
        self._note_changes()
        news, self._untold = self._untold, []
        if not news:
            return
        try:
            async with asyncio.timeout(_HEAR_SECONDS):
                await self._peers.hear(news)
        except Exception as error:  # they catch up by themselves
            logger.warning("not every replica has heard of a change yet: %r", error)

    async def pin(self, pool: str, value: str | None) -> None:
        """Tell everyone on which replicas a pool is pinned, in the words of `cluster.pins`."""
        async with self._one_hearing:
            news = self._shared.note("pin", pool, value)
            self._untold.append(news)
            await self._act(news, writes=False)  # this replica may have to give it up
        await self.spread()

    # -- keeping in step --

    async def catch_up(self) -> None:
        """Hear what the others know and this replica does not."""
        self._note_changes()
        mine = self._shared.all()
        told = await self._peers.tell([item.stamp for item in mine])
        news = sorted((item for one in told for item in one), key=lambda item: item.stamp)
        await self.hear(news)

    async def keep_in_step(self) -> None:
        """Catch up until cancelled: soon after joining, then rarely."""
        delays = iter(_AGAIN_SECONDS)
        while True:
            await asyncio.sleep(next(delays, _STEADY_SECONDS))
            try:
                await self.spread()
                await self.catch_up()
                await self.move_pins()
            except Exception as error:  # a peer or Ray's controller is away: next time
                logger.warning("the other replicas were not asked for their pools: %s", error)

    async def move_pins(self) -> None:
        """Take over pins of replicas that are gone, and leave to new ones what is theirs."""
        running = frozenset(await self._peers.names())
        if running == self._running:
            return
        async with self._one_hearing:
            for news in self._shared.pins():
                await self._act(news, writes=False)
        self._running = running

    def _note_changes(self) -> None:
        """Make news of what has changed here since the last call, in whatever way."""
        now, before = self._defined(), self._seen
        self._seen = now
        note, untold = self._shared.note, self._untold
        changed = [pool for name, pool in now.items() if before.get(name) is not pool]
        untold += [note("pool", pool.name, format_pool(pool)) for pool in changed]
        gone = set(before) - set(now)
        untold += [note("pool", name, None) for name in sorted(gone)]
        pinned = [news.name for news in self._shared.pins()]
        unpinned = [name for name in pinned if gone.intersection(pools_of(name))]
        untold += [note("pin", name, None) for name in unpinned]

    def _defined(self) -> dict[str, ExpertPool]:
        if self._service is None:
            return {}
        return {pool.name: pool for pool in self._service.lookup.named}

    async def _act(self, news: News, *, writes: bool) -> None:
        assert self._service is not None
        try:
            if news.kind == "pin":
                await self._act_on_pin(self._service, news)
            elif news.value is None:
                await self._remove(self._service, news.name, writes)
            else:
                await self._define(self._service, news.value, writes)
        except EmoServeError as error:
            logger.error("this replica cannot follow a change to %s: %s", news.name, error)

    async def _define(self, service: PoolService, document: str, writes: bool) -> None:
        pool = parse_pool("news", parse_json("news", document.encode()))
        known = self._seen.get(pool.name)
        if known is not None and format_pool(known) == document:
            return
        status, _ = await service.definitions.add(pool, replace=True, writes=writes)
        self._seen[pool.name] = status.pool

    async def _remove(self, service: PoolService, name: str, writes: bool) -> None:
        with suppress(UnknownPool):
            await service.definitions.remove(name, writes=writes)
        self._seen.pop(name, None)

    async def _act_on_pin(self, service: PoolService, news: News) -> None:
        running = {self.name}  # soon, if not yet
        if news.value not in (None, EVERYWHERE):
            self._running = frozenset()  # look again: who runs may change just now
            running |= {*await self._peers.names()}
        held_by = holders(news.name, news.value, sorted(running), self._rendezvous)
        is_pinned = service.residency.is_pinned(news.name)
        if is_pinned and self.name not in held_by:
            service.residency.unpin(news.name)
        elif not is_pinned and self.name in held_by:
            await service.residency.load(news.name, pin=True)
