"""The gate every HTTP request passes: pool header in, refusals out, and the way out at shutdown.

Pure ASGI around vLLM's app, which takes no middleware once it is built. A request carries one
mutable `RequestContext` through its tasks; the generation hook reads the header there, and leaves
how long a refused client should wait and what the request still waits for. A stream's status is
sent before its first token is asked for, so it is held back here until the pool is leased: a client
whose pool could not be loaded in time gets a 503 and not a stream that begins with an error.

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

from emo_serve.errors import Draining, EmoServeError
from emo_serve.server.http_errors import error_body, retry_after_of, status_of
from emo_serve.server.pool_choice import POOL_HEADER

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

_HEADER = POOL_HEADER.encode()


@dataclass
class RequestContext:
    """What the gate and the generation hook tell each other about one HTTP request.

    `admissions` has one future an engine request: None once its pool is leased, or the refusal.
    """

    pool_headers: tuple[str, ...] = ()
    retry_after_seconds: int | None = None
    admissions: list[asyncio.Future[EmoServeError | None]] = field(default_factory=list)

    async def refusal(self) -> EmoServeError | None:
        """Wait until every engine request has its pool, or one cannot have it; return why."""
        for admission in self.admissions:
            if (error := await asyncio.shield(admission)) is not None:
                return error
        return None


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
        headers = tuple(
            value.decode("latin-1") for key, value in scope["headers"] if key == _HEADER
        )
        context = RequestContext(pool_headers=headers)
        token = _CURRENT.set(context)
        self._enter(counted)
        try:
            await self.app(scope, receive, _guarded(send, context))
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


def _guarded(send: Send, context: RequestContext) -> Send:
    """Return a `send` that turns a stream nobody can be given a pool for into a refusal."""
    is_refused = False

    async def send_message(message: Message) -> None:
        nonlocal is_refused
        if is_refused:  # the rest of a stream that was never begun
            return
        if message["type"] == "http.response.start":
            if message["status"] == HTTPStatus.OK:
                error = await context.refusal()
                if error is not None:
                    is_refused = True
                    await _refuse(send, error)
                    return
            if message["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                extra = _retry_after(context.retry_after_seconds)
                message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return send_message


def _retry_after(seconds: int | None) -> list[tuple[bytes, bytes]]:
    return [] if seconds is None else [(b"retry-after", str(seconds).encode())]


async def _refuse(send: Send, error: EmoServeError, *headers: tuple[bytes, bytes]) -> None:
    """Answer with an error of ours before the app does."""
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
