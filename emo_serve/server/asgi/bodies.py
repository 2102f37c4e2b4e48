"""Bodies of requests, bounded in size and time before anything parses them.

Pure ASGI. A body is read here as a whole, up to the limit, and handed on as one message: a larger
one is refused by its Content-Length before it is read, or without one as soon as it is too long,
and one that stops coming is refused after a while. So no route can be made to hold more than the
limit, however it reads its body, and none waits for a slow client.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.server.asgi.errors import error_response

__all__ = ["READING_METHODS", "BodyLimit", "replay"]

READING_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing, and whose bodies no route reads."""

_MAX_DIGITS = 18
"""Digits of the largest Content-Length that is read as a number: Python refuses to read 4301."""
_PAUSE_SECONDS = 30.0
"""The longest wait for the next part of a body."""
_READ_SECONDS = 300.0
"""The longest a whole body may take."""
_LINGER_SECONDS = 2.0
"""How long a client that is still sending is listened to after its refusal, so that it reads it."""


class BodyLimit:
    """Wrap an ASGI app; it gets bodies of at most `max_bytes`, in one message."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        *,
        pause_seconds: float = _PAUSE_SECONDS,
        read_seconds: float = _READ_SECONDS,
    ) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._pause_seconds, self._read_seconds = pause_seconds, read_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one ASGI connection on, or refuse it with 400, 408 or 413."""
        if scope["type"] != "http" or scope["method"] in READING_METHODS:
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isascii() or not announced.isdigit() or len(announced) > _MAX_DIGITS:
            message = f"content-length is {announced[:40]!r}; expected a number of bytes"
            await self._refuse(HTTPStatus.BAD_REQUEST, message, scope, receive, send)
            return
        if int(announced) > self._max_bytes:
            await self._refuse_large(f"{announced} bytes", scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._read_seconds):
                body = await self._read(receive)
        except TimeoutError:
            message = (
                f"the body did not come within {self._pause_seconds:g} s of its last part, or"
                f" {self._read_seconds:g} s in all; send it without pauses"
            )
            await self._refuse(HTTPStatus.REQUEST_TIMEOUT, message, scope, receive, send)
            return
        if body is None:  # the client has disconnected
            return
        if len(body) > self._max_bytes:
            await self._refuse_large(f"more than {self._max_bytes} bytes", scope, receive, send)
            return
        await self.app(scope, replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or its beginning if it is too long; None if the client has left."""
        body = bytearray()
        while True:
            async with asyncio.timeout(self._pause_seconds):
                message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes or not message.get("more_body", False):
                return bytes(body)

    async def _refuse_large(self, size: str, scope: Scope, receive: Receive, send: Send) -> None:
        message = (
            f"the body has {size}; the limit is {self._max_bytes} (--max-body-size); send less"
        )
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        await self._refuse(status, message, scope, receive, send)

    async def _refuse(
        self, status: HTTPStatus, message: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer, and go on listening for a moment: a reset would overtake the answer."""

        async def send_and_linger(sent: Message) -> None:
            if sent["type"] != "http.response.body":
                await send(sent)
                return
            await send({**sent, "more_body": True})
            await _linger(receive)
            await send({"type": "http.response.body", "body": b""})

        response = error_response(scope, status, message, {"connection": "close"})
        await response(scope, receive, send_and_linger)


async def _linger(receive: Receive) -> None:
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body, and then goes on listening."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
