"""The gate every HTTP request passes: headers in, refusals and coverage out, the end at shutdown.

Pure ASGI around vLLM's app, which takes no middleware once it is built. A request carries one
mutable `RequestContext` through its tasks; the generation hook reads the header there, and leaves
how long a refused client should wait and what the request still waits for. A stream's status is
sent before its first token is asked for, so it is held back here until the pool is leased: a client
whose pool could not be loaded in time gets a 503 and not a stream that begins with an error.

On the way out the pool that served the request is named in a header. A client that has asked for
its coverage gets a whole answer when the engine requests' coverage is known, with the report in
header and body, and a stream's report as an event before its end: see coverage_answer.

While the gate is closed only reading is allowed: health, metrics, listings. What was let in before
is counted until its response ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from emo_serve.errors import Draining, EmoServeError, RequestError
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.coverage import (
    COVERAGE_HEADER,
    CoverageReport,
    EventTail,
    body_with,
    wants_coverage,
)
from emo_serve.server.asgi.errors import error_body, retry_after_of, status_of
from emo_serve.server.vllm_adapter.worker_calls import CoverageSum

__all__ = [
    "READING_METHODS",
    "AsgiApp",
    "Message",
    "Receive",
    "RequestContext",
    "RequestGate",
    "Scope",
    "Send",
    "current_request",
    "send_error",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

READING_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""

_JSON, _EVENTS = b"application/json", b"text/event-stream"


@dataclass
class RequestContext:
    """What the gate and the generation hook tell each other about one HTTP request.

    The lists get one entry an engine request: `admissions` a future of None once its pool is leased
    or of the refusal, `pool_names` the pool it runs in, and, if `wants_coverage`, `coverages` a
    future of what of it was routed, which must be resolved however the request ends.
    """

    pool_headers: tuple[str, ...] = ()
    wants_coverage: bool = False
    retry_after_seconds: int | None = None
    admissions: list[asyncio.Future[EmoServeError | None]] = field(default_factory=list)
    pool_names: list[str] = field(default_factory=list)
    coverages: list[asyncio.Future[CoverageSum | None]] = field(default_factory=list)

    @property
    def pools(self) -> str:
        """Return the names of the pools that serve the request, each once; mostly it is one."""
        return ", ".join(dict.fromkeys(self.pool_names))

    async def refusal(self) -> EmoServeError | None:
        """Wait until every engine request has its pool, or one cannot have it; return why."""
        for admission in self.admissions:
            if (error := await asyncio.shield(admission)) is not None:
                return error
        return None

    async def report(self) -> CoverageReport:
        """Wait until every engine request has ended; return what they have covered together."""
        sums = [await asyncio.shield(coverage) for coverage in self.coverages]
        return CoverageReport.of(self.pools, sums)


_CURRENT: ContextVar[RequestContext | None] = ContextVar("emo_serve_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the HTTP request being handled; an empty one outside of any."""
    return _CURRENT.get() or RequestContext()


class RequestGate:
    """Wrap an ASGI app; count what is under way, and refuse new work once closed."""

    def __init__(self, app: AsgiApp) -> None:
        self.app = app
        self.is_closed = False
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Refuse new work from now on; a second call changes nothing."""
        self.is_closed = True

    async def idle(self, timeout_seconds: float) -> bool:
        """Wait until nothing is under way; False when that took longer."""
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
        counted = scope["method"] not in READING_METHODS
        if counted and self.is_closed:
            error = Draining(
                "the server is shutting down; send the request to another or try again later"
            )
            await _refuse(send, error, (b"connection", b"close"))
            return
        try:
            wants = wants_coverage(_values(scope, COVERAGE_HEADER))
        except RequestError as error:
            await _refuse(send, error)
            return
        context = RequestContext(tuple(_values(scope, POOL_HEADER)), wants)
        token = _CURRENT.set(context)
        self._enter(counted)
        try:
            await self.app(scope, receive, _Answer(send, context))
        finally:
            self._leave(counted)
            _CURRENT.reset(token)

    def _enter(self, counted: bool) -> None:
        if counted:
            self.num_running += 1
            self._idle.clear()

    def _leave(self, counted: bool) -> None:
        if counted:
            self.num_running -= 1
            if self.num_running == 0:
                self._idle.set()


class _Answer:
    """The `send` of one request's app: what of its messages goes out, and when.

    A stream nobody can be given a pool for becomes a refusal. With coverage wanted, a JSON answer
    is kept until it is whole, and a stream's last event until the others and the report are out.
    """

    def __init__(self, send: Send, context: RequestContext) -> None:
        self._send, self._context = send, context
        self._is_refused = False
        self._held: Message | None = None  # the start of a JSON answer
        self._body = b""
        self._tail: EventTail | None = None

    async def __call__(self, message: Message) -> None:
        if self._is_refused:  # the rest of a stream that was never begun
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
            await _refuse(self._send, error, *_named(context))
            return
        extra = _named(context)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            extra += _retry_after(context.retry_after_seconds)
        message = {**message, "headers": [*message["headers"], *extra]}
        if status == HTTPStatus.OK and context.wants_coverage and context.pool_names:
            kind = _value(message, b"content-type").partition(b";")[0].strip()
            if kind == _JSON:
                self._held = message
                return
            if kind == _EVENTS:
                self._tail = EventTail()
        await self._send(message)

    async def _send_held(self, start: Message) -> None:
        report, body = await self._context.report(), self._body
        if not _value(start, b"content-encoding"):
            body = body_with(body, report)
        length = (b"content-length", str(len(body)).encode())
        others = [pair for pair in start["headers"] if pair[0].lower() != length[0]]
        await self._send({**start, "headers": [*others, length, *report.headers]})
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


def _values(scope: Scope, header: str) -> list[str]:
    """Return the values of a request header, as many as were sent."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == header.encode()]


def _value(start: Message, header: bytes) -> bytes:
    """Return the value of a response header, b"" without one."""
    return next((value for key, value in start["headers"] if key.lower() == header), b"")


def _named(context: RequestContext) -> list[tuple[bytes, bytes]]:
    return [(POOL_HEADER.encode(), context.pools.encode())] if context.pool_names else []


def _retry_after(seconds: int | None) -> list[tuple[bytes, bytes]]:
    return [] if seconds is None else [(b"retry-after", str(seconds).encode())]


async def _refuse(send: Send, error: EmoServeError, *headers: tuple[bytes, bytes]) -> None:
    """Answer with an error of ours in the app's place."""
    headers = (*headers, *_retry_after(retry_after_of(error)))
    await send_error(send, status_of(error), str(error), *headers)


async def send_error(
    send: Send, status: HTTPStatus, message: str, *headers: tuple[bytes, bytes]
) -> None:
    """Send a whole response: an error in OpenAI's shape."""
    body = error_body(message, status)
    all_headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status.value, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})
