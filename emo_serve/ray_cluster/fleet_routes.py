"""What clients ask a fleet about pools, answered by the replica that was asked, for all of them.

    GET /v1/pools, GET /v1/pools/NAME   merged; with ?replica=ID of that one alone, as every request
                                        with it is answered there
    POST /v1/pools/NAME/load            on the first replica of the pool's order; evict, pin and
                                        unpin on all; ?replicas=N on N of them, or all
    POST /v1/pools/evict-all            on all
    all that changes definitions        here; the others hear of it before the answer

evict and unpin with a number begin at the last replicas of the order, so the first ones keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, unquote, urlencode

from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.cluster.merged import merged_card, merged_list
from emo_serve.cluster.pins import pinned_on
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.errors import EmoServeError, RequestError, UnknownPool
from emo_serve.ray_cluster.local_requests import LocalAnswer, LocalRequest, is_local
from emo_serve.ray_cluster.member import FleetMember, Peers
from emo_serve.server.asgi.errors import refusal, route_path

__all__ = ["FleetRoutes"]

_POOLS = "/v1/pools"
_OF_ONE = (_POOLS, "/v1/residency", "/metrics")
_EVENTS = "/v1/residency/events"
_EVICT_ALL = f"{_POOLS}/evict-all"
_VERBS = {"load": 1, "evict": None, "pin": None, "unpin": None}
"""On how many replicas each is done unless the request says so; None is all."""
_FROM_THE_END = ("evict", "unpin")


class FleetRoutes:
    """Wrap the routes of a server's app; all but those about pools pass unchanged."""

    def __init__(self, app: ASGIApp, member: FleetMember, peers: Peers) -> None:
        self._app = app
        self._member, self._peers = member, peers
        self._rendezvous = Rendezvous()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        path = "" if scope["type"] != "http" or is_local(scope) else route_path(scope)
        if path == _EVENTS or not path.startswith(_OF_ONE):
            await self._app(scope, receive, send)
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
                change = self._change(request, options)
                answer = await self._member.service.definitions.to_the_end(change)
            else:
                await self._app(scope, receive, send)
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
            return await self._member.ask(request)
        merge = merged_list if request.path == _POOLS else merged_card
        return LocalAnswer.of(merge(good))

    async def _change(self, request: LocalRequest, options: Mapping[str, str]) -> LocalAnswer:
        pool, _, verb = request.path.removeprefix(f"{_POOLS}/").rpartition("/")
        if request.method == "POST" and verb in _VERBS:
            return await self._place(request, unquote(pool), verb, options)
        if request.method == "POST" and request.path == _EVICT_ALL:
            return await self._evict_all(request)
        answer = await self._member.ask(request)
        await self._member.spread()
        return answer

    async def _place(
        self, request: LocalRequest, pool: str, verb: str, options: Mapping[str, str]
    ) -> LocalAnswer:
        """Load, evict, pin or unpin a pool on some replicas, or on all."""
        found = self._member.service.lookup.find(pool).name
        card = LocalRequest("GET", f"{_POOLS}/{pool}")
        able = list(self._rendezvous.ranks(found, await self._peers.names()))
        number = _number(options.get("replicas"), _VERBS[verb])
        if verb == "unpin" and number is not None:
            cards = await self._peers.ask(card, able)
            able = [one for one in able if one in cards and cards[one].json().get("pinned")]
        chosen = able if number is None else _some(able, number, verb)
        answers = await self._peers.ask(request, chosen)
        if (failed := await self._failed(request, answers)) is not None:
            return failed
        if verb == "pin":
            await self._member.pin(found, pinned_on(number))
        elif verb == "unpin":
            await self._member.pin(found, pinned_on(len(able) - len(chosen)))
        return await self._merged(card)

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
            return failed[0] if failed else await self._member.ask(request)
        return None


def _some(ordered: Sequence[str], number: int, verb: str) -> Sequence[str]:
    """Return the first replicas of the pool's order, or the last ones."""
    return ordered[-number:] if verb in _FROM_THE_END else ordered[:number]


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
