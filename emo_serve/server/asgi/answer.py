"""The answer to one request: which messages go out, and when.

vLLM sends a stream's status before its first token, and for some routes (/v1/responses) before it
has even asked the engine. Both are held back until the pool is leased: a client whose request is
refused gets the status, not a stream that breaks off. If nothing has been asked yet, the stream's
first events are held, too.

Each answer names in a header the pool that served it. If a client asked for coverage, a JSON answer
is held until the coverage of its engine requests is known, and so is a stream's last event: see
`asgi.coverage`.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.errors import EmoServeError
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.bodies import READING_METHODS
from emo_serve.server.asgi.context import RequestContext
from emo_serve.server.asgi.coverage import EventTail, body_with
from emo_serve.server.asgi.errors import cause_of, last_events, refusal
from emo_serve.server.asgi.temperature import ROUTER_TEMPERATURE_HEADER

__all__ = ["Answer"]

logger = logging.getLogger(__name__)

_EVENT_STREAM = "text/event-stream"
_MAX_EARLY = 16
"""Messages held of a stream that has asked for nothing; /v1/responses begins with three."""


class Answer:
    """The `send` of one request's app, which `run` calls."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._context = context
        self._is_refused = False
        self._early: list[Message] = []  # the beginning of a stream that has asked for nothing yet
        self._opening: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()  # two tasks may send: the app's, and `_opening`
        self._held: Message | None = None  # the start of a JSON answer
        self._body = b""
        self._tail: EventTail | None = None
        self._num_events: int | None = None  # sent, of a stream that has begun and not ended

    async def run(self, app: ASGIApp) -> None:
        """Run the app to its end; what it raises because of a refusal is answered, too."""
        try:
            async with asyncio.timeout(None) as self._running:
                await app(self._scope, self._receive, self)
        except Exception as raised:
            error = cause_of(raised)
            async with self._sending:
                is_answered = self._is_refused or await self._has_ended_with(error)
            if is_answered and (error is not None or isinstance(raised, TimeoutError)):
                return
            if self._early and isinstance(raised, RuntimeError) and raised.__cause__ is not None:
                # Starlette says that the response has started; vLLM's handlers know the cause.
                raise raised.__cause__ from None
            raise
        finally:
            if self._opening is not None:
                self._opening.cancel()

    async def __call__(self, message: Message) -> None:
        """Take one message from the app."""
        async with self._sending:
            if self._is_refused:  # the rest of a stream that was refused or cut
                return
            if message["type"] == "http.response.start":
                await self._begin(message)
            elif self._early:
                await self._hold(message)
            elif self._num_events is not None and self._context.cut_by is not None:
                await self._end_with(self._context.cut_by)  # and not with vLLM's error event
            else:
                await self._pass_on(message)

    # -- the beginning --

    async def _begin(self, start: Message) -> None:
        is_ok = start["status"] == HTTPStatus.OK
        if is_ok and not self._context.is_asked.is_set() and self._may_ask_later(start):
            self._early.append(start)
            self._opening = asyncio.create_task(self._open_once_admitted())
        elif is_ok and (error := await self._context.refusal()) is not None:
            await self._refuse(error)
        else:
            await self._start(start)

    def _may_ask_later(self, start: Message) -> bool:
        return self._scope["method"] not in READING_METHODS and _kind_of(start) == _EVENT_STREAM

    async def _hold(self, message: Message) -> None:
        self._early.append(message)
        if len(self._early) > _MAX_EARLY or not message.get("more_body", False):
            await self._open()

    async def _open_once_admitted(self) -> None:
        await self._context.is_asked.wait()
        error = await self._context.refusal()
        async with self._sending:
            if not self._early:
                return
            if error is None:
                await self._open()
                return
            await self._refuse(error)
        # vLLM's stream of a background response would wait for events forever.
        self._running.reschedule(asyncio.get_running_loop().time())

    async def _open(self) -> None:
        start, *events = self._early
        self._early.clear()
        await self._start(start)
        for event in events:
            await self._pass_on(event)

    async def _start(self, start: Message) -> None:
        status, context = start["status"], self._context
        headers = MutableHeaders(scope=start)
        headers.update(self._pool_header())
        if status == HTTPStatus.SERVICE_UNAVAILABLE and context.retry_after_seconds is not None:
            headers["retry-after"] = str(context.retry_after_seconds)
        kind = _kind_of(start)
        if kind == _EVENT_STREAM:
            self._num_events = 0
        if status == HTTPStatus.OK and context.wants_coverage and context.pool_names:
            if kind == "application/json":
                self._held = start
                return
            if kind == _EVENT_STREAM:
                self._tail = EventTail()
        await self._send(start)

    # -- what follows --

    async def _pass_on(self, message: Message) -> None:
        if self._num_events is not None:
            self._num_events = self._num_events + 1 if message.get("more_body", False) else None
        if self._held is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_held(self._held)
        elif self._tail is not None:
            await self._send_events(self._tail, message)
        else:
            await self._send(message)

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
                out += tail.last(event, await self._context.report())
            else:
                out += event
        has_more = message.get("more_body", False)
        if not has_more:
            out += tail.rest
        await self._send({**message, "body": out, "more_body": has_more})

    # -- refusals --

    async def _refuse(self, error: EmoServeError) -> None:
        self._note(error, "is refused")
        self._early.clear()
        response = refusal(self._scope, error, self._pool_header())
        await response(self._scope, self._receive, self._send)

    async def _has_ended_with(self, error: EmoServeError | None) -> bool:
        """Answer with an error that the app has raised, if the answer is still open for it."""
        if error is None:
            return False
        if self._early:
            await self._refuse(error)
            return True
        if self._num_events is None:
            return False
        await self._end_with(error)
        return True

    async def _end_with(self, error: EmoServeError) -> None:
        """End a stream that has begun."""
        self._note(error, "ends with an error")
        body = last_events(self._scope, error, self._num_events or 0)
        await self._send({"type": "http.response.body", "body": body})

    def _note(self, error: EmoServeError, what: str) -> None:
        """Log the refusal in one line, unless vLLM has already done so."""
        self._is_refused = True
        if not self._context.is_refusal_logged:
            self._context.is_refusal_logged = True
            logger.warning("%s %s %s: %s", self._scope["method"], self._scope["path"], what, error)

    def _pool_header(self) -> dict[str, str]:
        context = self._context
        if not context.pool_names:
            return {}
        headers = {POOL_HEADER: context.pools}
        if context.router_temperature is not None:
            headers[ROUTER_TEMPERATURE_HEADER] = f"{context.router_temperature:g}"
        return headers


def _kind_of(start: Message) -> str:
    return _lower_case(start).get("content-type", "").partition(";")[0].strip()


def _lower_case(start: Message) -> MutableHeaders:
    """Return a copy of a response's headers with lower-case names: Starlette finds no others."""
    return MutableHeaders(raw=[(name.lower(), value) for name, value in start["headers"]])
