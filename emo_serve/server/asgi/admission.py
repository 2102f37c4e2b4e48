"""Admission: the layer that every HTTP request passes, from its headers to the end of its answer.

Pure ASGI around vLLM's app, which takes no middleware once it is built. A request carries one
mutable `RequestContext` through its tasks. The generation hook reads the request's headers there,
and writes back when a refused client may retry and which futures the answer must wait for. A
stream's status would be sent before its first token, so it is held back here until the pool is
leased: a client whose pool is not loaded in time gets a 503, not a stream that begins with an
error.

Each answer names in a header the pool that served it. If a client asked for coverage, its answer is
held back until the coverage of its engine requests is known; the report is in a header and in the
body, or for a stream in an event before the last: see `asgi.coverage`.

Once admission is closed, only reading is allowed: health, metrics, listings. Requests admitted
before are counted until their responses end.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.errors import Draining, EmoServeError, RequestError
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.bodies import READING_METHODS
from emo_serve.server.asgi.context import RequestContext, entered
from emo_serve.server.asgi.coverage import COVERAGE_HEADER, EventTail, body_with, wants_coverage
from emo_serve.server.asgi.errors import refusal

__all__ = ["Admission"]


class Admission:
    """Wrap an ASGI app: count running requests, and refuse new work once closed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.is_closed = False
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Refuse new work from now on; calling it again changes nothing."""
        self.is_closed = True

    async def idle(self, timeout_seconds: float) -> bool:
        """Wait until no request is running; False if some still run after the timeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.num_running:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_counted = scope["method"] not in READING_METHODS
        if is_counted and self.is_closed:
            error = Draining(
                "the server is shutting down; send the request to another server, or retry later"
            )
            await refusal(scope, error, {"connection": "close"})(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            wants = wants_coverage(headers.getlist(COVERAGE_HEADER))
        except RequestError as bad_header:
            await refusal(scope, bad_header)(scope, receive, send)
            return
        context = RequestContext(tuple(headers.getlist(POOL_HEADER)), wants)
        self._enter(is_counted)
        try:
            with entered(context):
                await self.app(scope, receive, _Answer(scope, receive, send, context))
        finally:
            context.end()  # a client that left before its stream began: nobody reads the generator
            self._leave(is_counted)

    def _enter(self, is_counted: bool) -> None:
        if is_counted:
            self.num_running += 1
            self._idle.clear()

    def _leave(self, is_counted: bool) -> None:
        if is_counted:
            self.num_running -= 1
            if self.num_running == 0:
                self._idle.set()


class _Answer:
    """The `send` of one request's app: it decides which messages go out, and when.

    A stream whose pool is refused becomes an error response. If the client wants coverage, a JSON
    answer is held until the report is complete, and so is a stream's last event.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._context = context
        self._is_refused = False
        self._held: Message | None = None  # the start of a JSON answer
        self._body = b""
        self._tail: EventTail | None = None

    async def __call__(self, message: Message) -> None:
        if self._is_refused:  # the rest of a stream that was refused
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_held(self._held)
        elif self._tail is not None:
            await self._send_events(self._tail, message)
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        status, context = message["status"], self._context
        if status == HTTPStatus.OK and (error := await context.refusal()) is not None:
            self._is_refused = True
            await self._refuse(error)
            return
        headers = MutableHeaders(scope=message)
        headers.update(self._pool_header())
        if status == HTTPStatus.SERVICE_UNAVAILABLE and context.retry_after_seconds is not None:
            headers["retry-after"] = str(context.retry_after_seconds)
        if status == HTTPStatus.OK and context.wants_coverage and context.pool_names:
            kind = _lower_case(message).get("content-type", "").partition(";")[0].strip()
            if kind == "application/json":
                self._held = message
                return
            if kind == "text/event-stream":
                self._tail = EventTail()
        await self._send(message)

    async def _refuse(self, error: EmoServeError) -> None:
        await refusal(self._scope, error, self._pool_header())(
            self._scope, self._receive, self._send
        )

    async def _send_held(self, start: Message) -> None:
        report, body = await self._context.report(), self._body
        headers = _lower_case(start)
        if "content-encoding" not in headers:
            body = body_with(body, report)
        headers["content-length"] = str(len(body))
        headers.update(report.headers)
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})

    async def _send_events(self, tail: EventTail, message: Message) -> None:
        out = b""
        for event in tail.take(message.get("body", b"")):
            if tail.is_last(event):
                out += tail.event(await self._context.report())
            out += event
        has_more = message.get("more_body", False)
        if not has_more:
            out += tail.rest
        await self._send({**message, "body": out, "more_body": has_more})

    def _pool_header(self) -> dict[str, str]:
        return {POOL_HEADER: self._context.pools} if self._context.pool_names else {}


def _lower_case(start: Message) -> MutableHeaders:
    """Return a copy of a response's headers with lower-case names: Starlette finds no others."""
    return MutableHeaders(raw=[(name.lower(), value) for name, value in start["headers"]])
