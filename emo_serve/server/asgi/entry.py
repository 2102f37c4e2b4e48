"""A few requests at a time between their arrival and the engine, so that none waits for a flood.

Parsing, checking and tokenizing one request takes milliseconds of the event loop, in several
pieces. If thousands arrive at once, each turn of the loop has a piece of each to do, and whatever
else there is, a probe or a token of a stream, waits for all of them. Here the others wait in line,
which costs nothing. A request leaves the entry when it asks the engine for its pool, when it begins
to answer, when it has much text to tokenize, or at the latest after a second.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.server.asgi.context import current_request

__all__ = ["Entry"]

_AT_ONCE = 8
_LONGEST_SECONDS = 1.0


class Entry:
    """Wrap an ASGI app inside `Admission`; at most `at_once` POST requests enter it together."""

    def __init__(self, app: ASGIApp, at_once: int = _AT_ONCE) -> None:
        self.app = app
        self._places = asyncio.Semaphore(at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        await self._places.acquire()
        place = _Place(self._places)
        context = current_request()
        context.on_entered = place.leave

        async def send_and_leave(message: Message) -> None:
            place.leave()
            await send(message)

        try:
            await self.app(scope, receive, send_and_leave)
        finally:
            place.leave()


class _Place:
    """One place in the entry, given back once."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places: asyncio.Semaphore | None = places
        self._timer = asyncio.get_running_loop().call_later(_LONGEST_SECONDS, self.leave)

    def leave(self) -> None:
        if self._places is not None:
            self._timer.cancel()
            self._places.release()
            self._places = None
