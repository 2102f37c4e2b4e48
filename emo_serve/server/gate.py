"""The gate every HTTP request passes: pool header in, Retry-After out, and the way out at shutdown.

Pure ASGI around vLLM's app, which takes no middleware once it is built. A request carries one
mutable `RequestContext` through its tasks; the generation hook reads the header there and leaves
how long a refused client should wait. While the gate is closed only reading is allowed: health,
metrics, listings. What was let in before is counted until its response ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from emo_serve.server.pool_choice import POOL_HEADER

__all__ = [
    "AsgiApp",
    "Message",
    "Receive",
    "RequestContext",
    "RequestGate",
    "Scope",
    "Send",
    "current_request",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_READING = ("GET", "HEAD", "OPTIONS")
_HEADER = POOL_HEADER.encode()


@dataclass
class RequestContext:
    """What the gate and the generation hook tell each other about one HTTP request."""

    pool_headers: tuple[str, ...] = ()
    retry_after_seconds: int | None = None


_CURRENT: ContextVar[RequestContext | None] = ContextVar("emo_serve_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the HTTP request being handled; an empty one outside of any."""
    return _CURRENT.get() or RequestContext()


class RequestGate:
    """Wrap an ASGI app; count what is under way, and refuse new work once closed."""

    def __init__(self, app: AsgiApp, retry_after_seconds: int = 1) -> None:
        self.app = app
        self.is_closed = False
        self.num_running = 0
        self._retry_after_seconds = retry_after_seconds
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
        counted = scope["method"] not in _READING
        if counted and self.is_closed:
            await _refuse(send, self._retry_after_seconds)
            return
        headers = tuple(
            value.decode("latin-1") for key, value in scope["headers"] if key == _HEADER
        )
        context = RequestContext(pool_headers=headers)
        token = _CURRENT.set(context)
        self._enter(counted)
        try:
            await self.app(scope, receive, _with_retry_after(send, context))
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


def _with_retry_after(send: Send, context: RequestContext) -> Send:
    async def send_message(message: Message) -> None:
        if (
            message["type"] == "http.response.start"
            and message["status"] == HTTPStatus.SERVICE_UNAVAILABLE
            and context.retry_after_seconds is not None
        ):
            value = str(context.retry_after_seconds).encode()
            message = {**message, "headers": [*message["headers"], (b"retry-after", value)]}
        await send(message)

    return send_message


async def _refuse(send: Send, retry_after_seconds: int) -> None:
    """Answer 503 in the shape of vLLM's own errors."""
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = {
        "message": "The server is shutting down; send the request to another or try again later.",
        "type": status.phrase,
        "param": None,
        "code": status.value,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(retry_after_seconds).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body})
