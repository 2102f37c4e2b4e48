"""One replica's part in the fleet's pools: one truth, wherever a change arrives.

A change arrives at one replica, which makes it as a single server would, and answers once the
others have heard of it. News name a pool by its document; a replica that has the same content does
nothing. A replica that joins hears everything before it is ready, and asks again from time to time,
since a change may be made just while it joins. Files in --pools are written only where a change
arrives.

What a client asks here about pools concerns all replicas:

    GET /v1/pools, GET /v1/pools/NAME   merged; with ?replica=ID of that one alone, as every request
                                        with it is answered there
    POST /v1/pools/NAME/load            on the first replica of the pool's order; evict, pin and
                                        unpin on all; ?replicas=N on N of them, or all
    POST /v1/pools/evict-all            on all
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlencode

from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.cluster.merged import merged_card, merged_list
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.cluster.shared import News, SharedPools, Stamp
from emo_serve.errors import EmoServeError, RequestError, UnknownPool
from emo_serve.names import pools_of
from emo_serve.pools.document import format_pool, parse_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.strict_json import parse_json
from emo_serve.ray_cluster.local_requests import (
    LocalAnswer,
    LocalRequest,
    ask_app,
    is_local,
)
from emo_serve.server.asgi.errors import refusal, route_path
from emo_serve.server.pool_admin.service import PoolService

__all__ = ["FleetMember", "Peers"]

logger = logging.getLogger(__name__)

_POOLS = "/v1/pools"
_OF_ONE = (_POOLS, "/v1/residency", "/metrics")
_EVENTS = "/v1/residency/events"
_EVICT_ALL = f"{_POOLS}/evict-all"
_VERBS = {"load": 1, "evict": None, "pin": None, "unpin": None}
"""On how many replicas each is done unless the request says so; None is all."""
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
    """Keep one replica's pools as the fleet's, and answer what concerns all replicas."""

    def __init__(self, name: str, peers: Peers) -> None:
        self.name = name
        self._peers = peers
        self._shared = SharedPools(name)
        self._rendezvous = Rendezvous()
        self._one_hearing = asyncio.Lock()
        self._seen: dict[str, ExpertPool] = {}
        self._untold: list[News] = []
        self._inner: ASGIApp | None = None
        self._app: ASGIApp | None = None
        self._key: str | None = None
        self._service: PoolService | None = None

    def around(self, app: ASGIApp) -> ASGIApp:
        """Put the layer around the routes of a server's app."""
        self._inner = app
        return self._answer

    async def join(self, service: PoolService, app: ASGIApp, key: str | None = None) -> None:
        """Take over the fleet's pools; call it before the first request.

        `app` is the whole app with this layer in it, and `key` an operator's, if it needs one.
        """
        self._service, self._app, self._key = service, app, key
        self._seen = self._defined()
        await self.catch_up()

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
                await self._spread()
                await self.catch_up()
            except Exception as error:  # a peer or Ray's controller is away: next time
                logger.warning("the other replicas were not asked for their pools: %s", error)

    def _note_changes(self) -> None:
        """Make news of what has changed here since the last call, in whatever way."""
        now, before = self._defined(), self._seen
        self._seen = now
        note, untold = self._shared.note, self._untold
        changed = [pool for name, pool in now.items() if before.get(name) is not pool]
        untold += [note("pool", pool.name, format_pool(pool)) for pool in changed]
        gone = set(before) - set(now)
        untold += [note("pool", name, None) for name in sorted(gone)]
        unpinned = [name for name in self._shared.pins() if gone.intersection(pools_of(name))]
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
        is_pinned = service.residency.is_pinned(news.name)
        if news.value is None and is_pinned:
            service.residency.unpin(news.name)
        elif news.value is not None and not is_pinned:
            await service.residency.load(news.name, pin=True)

    async def _spread(self) -> None:
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

    # -- what clients ask --

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._inner is not None
        path = "" if scope["type"] != "http" or is_local(scope) else route_path(scope)
        if path == _EVENTS or not path.startswith(_OF_ONE):
            await self._inner(scope, receive, send)
            return
        query: bytes = scope.get("query_string", b"")
        options = dict(parse_qsl(query.decode("latin-1")))
        method: str = scope["method"]
        try:
            if method == "GET" and "replica" in options:
                request = LocalRequest(method, path, _without_ours(options))
                answer = await self._one(request, options["replica"])
            elif method == "GET" and _is_merged(path):
                answer = await self._merged(LocalRequest(method, path, query))
            elif method in ("POST", "DELETE") and path.startswith(_POOLS):
                body: bytes = (await receive()).get("body", b"")
                request = LocalRequest(method, path, _without_ours(options), body)
                assert self._service is not None
                change = self._change(request, options)
                answer = await self._service.definitions.to_the_end(change)
            else:
                await self._inner(scope, receive, send)
                return
        except EmoServeError as error:
            await refusal(scope, error)(scope, receive, send)
            return
        await answer(scope, receive, send)

    async def _one(self, request: LocalRequest, name: str) -> LocalAnswer:
        answers = await self._peers.ask(request, [name])
        if name not in answers:
            known = ", ".join(sorted(await self._peers.names()))
            raise UnknownPool(f"there is no replica {name!r}; the replicas are: {known}")
        return answers[name]

    async def _merged(self, request: LocalRequest) -> LocalAnswer:
        answers = await self._peers.ask(request)
        good = {name: one.json() for name, one in answers.items() if one.is_success}
        if not good:
            return await self.ask(request)
        merge = merged_list if request.path == _POOLS else merged_card
        return LocalAnswer.of(merge(good))

    async def _change(self, request: LocalRequest, options: Mapping[str, str]) -> LocalAnswer:
        pool, _, verb = request.path.removeprefix(f"{_POOLS}/").rpartition("/")
        if request.method == "POST" and verb in _VERBS:
            return await self._place(request, unquote(pool), verb, options)
        if request.method == "POST" and request.path == _EVICT_ALL:
            return await self._evict_all(request)
        answer = await self.ask(request)
        await self._spread()
        return answer

    async def _place(
        self, request: LocalRequest, pool: str, verb: str, options: Mapping[str, str]
    ) -> LocalAnswer:
        """Load, evict, pin or unpin a pool on some replicas, or on all."""
        assert self._service is not None
        found = self._service.lookup.find(pool).name
        chosen = self._chosen(found, await self._peers.names(), verb, options)
        answers = await self._peers.ask(request, chosen)
        if (failed := await self._failed(request, answers)) is not None:
            return failed
        if "replicas" not in options and verb in ("pin", "unpin"):
            value = "" if verb == "pin" else None
            self._untold.append(self._shared.note("pin", found, value))
            await self._spread()
        return await self._merged(LocalRequest("GET", f"{_POOLS}/{pool}"))

    async def _evict_all(self, request: LocalRequest) -> LocalAnswer:
        """Evict every pool that is not pinned, on all replicas."""
        answers = await self._peers.ask(request)
        failed = await self._failed(request, answers)
        return failed or await self._merged(LocalRequest("GET", _POOLS))

    async def _failed(
        self, request: LocalRequest, answers: Mapping[str, LocalAnswer]
    ) -> LocalAnswer | None:
        """Return the first answer that is an error, this replica's own if there is none at all."""
        failed = [one for one in answers.values() if not one.is_success]
        if failed or not answers:
            return failed[0] if failed else await self.ask(request)
        return None

    def _chosen(
        self, pool: str, replicas: Sequence[str], verb: str, options: Mapping[str, str]
    ) -> list[str]:
        """Return the first replicas of the pool's order; the last ones to evict it from."""
        ordered = list(self._rendezvous.ranks(pool, replicas))
        number = _number(options.get("replicas"), _VERBS[verb])
        if number is None:
            return ordered
        return ordered[-number:] if verb == "evict" else ordered[:number]


def _is_merged(path: str) -> bool:
    return path == _POOLS or (path.startswith(f"{_POOLS}/") and path.count("/") == 3)


def _without_ours(options: Mapping[str, str]) -> bytes:
    kept = {key: value for key, value in options.items() if key not in ("replica", "replicas")}
    return urlencode(kept).encode()


def _number(text: str | None, default: int | None) -> int | None:
    """Read `replicas`: a number, or all."""
    if text is None:
        return default
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise RequestError(f"replicas is {text!r}; expected a number from 1, or all")
    return int(text)
