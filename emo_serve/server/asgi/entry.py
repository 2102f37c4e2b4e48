"""A few requests at a time between their arrival and the engine, so that none waits for a flood.

Parsing, checking and tokenizing one request takes milliseconds of the event loop, in several
pieces. If thousands arrive at once, each turn of the loop has a piece of each to do, and whatever
else there is, a probe or a token of a stream, waits for all of them. Here the others wait in line,
which costs nothing: one line per model name, served in turn, so that a flood for one pool does not
keep requests for another waiting. A line that is too long takes no more: further requests get 503
before they are parsed. A request leaves the entry when it asks the engine for its pool, when it
begins to answer, when it has much text to tokenize, or at the latest after a second.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.errors import TooManyQueued
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.bodies import replay
from emo_serve.server.asgi.context import current_request
from emo_serve.server.asgi.errors import reason_of, refusal

__all__ = ["Entry"]

_AT_ONCE = 8
_LONGEST_SECONDS = 1.0
_LONGEST_LINE = 1024
_WEIGHT = 0.02  # of one more interval between entries, in their mean
_MAX_RETRY_SECONDS = 300
_MODEL = re.compile(rb'"model"\s*:\s*"([^"]{0,200})"')
"""Reads the model as most clients write it; a name that it misreads only waits in another line."""


class Entry:
    """Wrap an ASGI app inside `BodyLimit` and `Admission`.

    At most `at_once` POST requests enter it together, and at most `longest_line` for each model
    wait. `count` gets the reason of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str], None],
        at_once: int = _AT_ONCE,
        longest_line: int = _LONGEST_LINE,
    ) -> None:
        self.app, self._count = app, count
        self.num_free, self._longest_line = at_once, longest_line
        self._seconds_per_entry, self._last_entry = 0.01, 0.0  # while there are lines
        self._lines: dict[bytes, deque[asyncio.Future[None]]] = {}  # the next to be served first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        line = _line_of(scope, body)
        if len(self._lines.get(line, ())) >= self._longest_line:
            error = self._refused()
            self._count(reason_of(error))
            await refusal(scope, error)(scope, receive, send)
            return
        await self._enter(line)
        place = _Place(self._leave)
        current_request().on_entered = place.leave

        async def send_and_leave(message: Message) -> None:
            place.leave()
            await send(message)

        try:
            await self.app(scope, replay(body, receive), send_and_leave)
        finally:
            place.leave()

    async def _enter(self, line: bytes) -> None:
        if self.num_free:
            self.num_free -= 1
            return
        loop = asyncio.get_running_loop()
        if not self._lines:
            self._last_entry = loop.time()
        turn: asyncio.Future[None] = loop.create_future()
        self._lines.setdefault(line, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn has come in the same moment
                self._leave()
            raise

    def _leave(self) -> None:
        """Give the place to the next in line; each line has its turn."""
        while self._lines:
            name = next(iter(self._lines))
            line = self._lines.pop(name)
            turn = line.popleft()
            if line:
                self._lines[name] = line  # behind the other lines
            if not turn.done():  # else its client has left
                self._note_entry()
                turn.set_result(None)
                return
        self.num_free += 1

    def _note_entry(self) -> None:
        now = asyncio.get_running_loop().time()
        interval, self._last_entry = now - self._last_entry, now
        self._seconds_per_entry += _WEIGHT * (interval - self._seconds_per_entry)

    def _refused(self) -> TooManyQueued:
        waiting = sum(map(len, self._lines.values()))
        seconds = math.ceil(waiting * self._seconds_per_entry)
        return TooManyQueued(
            f"{self._longest_line} requests for this model wait to be parsed, and no more may; send"
            " the request again later, or to another server",
            min(max(1, seconds), _MAX_RETRY_SECONDS),
        )


class _Place:
    """One place in the entry, given back once."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._timer = asyncio.get_running_loop().call_later(_LONGEST_SECONDS, self.leave)

    def leave(self) -> None:
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            self._timer.cancel()
            give_back()


def _line_of(scope: Scope, body: bytes) -> bytes:
    found = _MODEL.search(body)
    header = Headers(scope=scope).get(POOL_HEADER, "")
    return header.encode() + b" " + (found[1] if found else b"")
