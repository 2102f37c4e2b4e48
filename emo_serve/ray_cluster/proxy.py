"""Our layer in Ray's HTTP proxies: what the router needs to know, and how answers end.

Ray Serve takes it from the environment of its proxies:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=emo_serve.ray_cluster.proxy.middlewares

A request's model stands in its body, which Ray's router does not see. So the layer reads the body
and puts a ticket into the header that Ray hands to the router. And when a replica dies, Ray ends
its streams without a word, and what it refuses itself is plain text: here such a stream ends with
an error event, and such a refusal is an error in the shape of its route, with Retry-After.
"""

from __future__ import annotations

import asyncio
from collections import deque
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.cluster.ticket import ticket_for
from emo_serve.errors import Unavailable
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.errors import last_events, refusal, route_path

__all__ = ["TICKET_HEADER", "ProxyLayer", "middlewares"]

TICKET_HEADER = "serve_multiplexed_model_id"
"""The header that Ray Serve gives to its routers; clients' own are dropped."""

_READ_BYTES = 64 * 2**20
_PAUSE_SECONDS = 30.0
_RETRY_SECONDS = 5
_RAYS_OWN = (
    HTTPStatus.NOT_FOUND,  # the application is being deleted
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
"""Statuses of Ray's own refusals, which are plain text; a replica's are JSON."""


def middlewares() -> list[Middleware]:
    """Return what Ray Serve puts around each of its HTTP proxies."""
    return [Middleware(ProxyLayer)]


class ProxyLayer:
    """Wrap a proxy's ASGI app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(receive)
        if scope["method"] == "POST":
            await body.read()
        answer = _Answer(scope, send)
        try:
            await self.app(_with_ticket(scope, body.whole), body.receive, answer.send)
        finally:
            await answer.end()


def _with_ticket(scope: Scope, body: bytes) -> Scope:
    names = (TICKET_HEADER, TICKET_HEADER.replace("_", "-"))
    headers = [entry for entry in scope["headers"] if entry[0].decode("latin-1") not in names]
    asked = tuple(Headers(scope=scope).getlist(POOL_HEADER))
    query: bytes = scope.get("query_string", b"")
    if text := ticket_for(scope["method"], route_path(scope), query, asked, body).encode():
        headers.append((TICKET_HEADER.encode(), text.encode()))
    return {**scope, "headers": headers}


class _Body:
    """A request's body, read ahead and handed on as it came."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: deque[Message] = deque()
        self._next: asyncio.Future[Message] | None = None
        self.whole = b""
        """All of it; empty while it has not been read to its end."""

    async def read(self) -> None:
        """Read up to the end, a limit, or a long pause; a replica refuses what is too much."""
        size, is_more = 0, True
        while is_more and size <= _READ_BYTES:
            self._next = asyncio.ensure_future(self._receive())
            done, _ = await asyncio.wait((self._next,), timeout=_PAUSE_SECONDS)
            if not done:
                return
            message, self._next = self._next.result(), None
            self._messages.append(message)
            size += len(message.get("body", b""))
            is_more = message.get("more_body", False)
        if not is_more:
            self.whole = b"".join(message.get("body", b"") for message in self._messages)

    async def receive(self) -> Message:
        """Return the next message, read ahead or not."""
        if self._messages:
            return self._messages.popleft()
        if self._next is not None:
            waiting, self._next = self._next, None
            return await waiting
        return await self._receive()


# -- answers --


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._is_replaced = self._is_stream = self._has_begun = self._has_ended = False
        self._events = 0

    async def send(self, message: Message) -> None:
        """Pass a message on, and note what it tells about the answer."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            kind = headers.get("content-type", "")
            if message["status"] in _RAYS_OWN and kind.startswith("text/plain"):
                self._is_replaced = True
                return
            self._has_begun = True
            self._is_stream = kind.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            if self._is_replaced:
                return  # `end` sends ours
            self._has_ended = not message.get("more_body", False)
            if self._is_stream:
                self._events += message.get("body", b"").count(b"\n\n")
        await self._send(message)

    async def end(self) -> None:
        """Complete an answer that has not been completed."""
        if self._has_ended:
            return
        if not self._has_begun:
            error = Unavailable(
                "no replica can take this request now; send it again later", _RETRY_SECONDS
            )
            await refusal(self._scope, error)(self._scope, _nothing, self._send)
        elif self._is_stream:
            error = Unavailable("the replica that answered has ended; send the request again")
            body = last_events(self._scope, error, self._events)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
