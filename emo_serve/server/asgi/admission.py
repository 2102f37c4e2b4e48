"""Admission: the layer that every HTTP request passes, from its headers to the end of its answer.

Pure ASGI around vLLM's app, which takes no middleware once it is built. A request carries one
mutable `RequestContext` through its tasks. The generation hook reads the request's headers there,
and writes back when a refused client may retry and which futures the answer must wait for. What
that means for the answer is decided in `asgi.answer`.

Once admission is closed, only reading is allowed: health, metrics, listings. Requests admitted
before are counted until their responses end.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.errors import Draining, RequestError
from emo_serve.names import POOL_HEADER
from emo_serve.server.asgi.answer import Answer
from emo_serve.server.asgi.bodies import READING_METHODS
from emo_serve.server.asgi.context import RequestContext, entered
from emo_serve.server.asgi.coverage import COVERAGE_HEADER, wants_coverage
from emo_serve.server.asgi.elastic import MIN_EXPERTS_HEADER, wanted_min_experts
from emo_serve.server.asgi.errors import refusal
from emo_serve.server.asgi.temperature import ROUTER_TEMPERATURE_HEADER, wanted_temperature

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
            least = wanted_min_experts(headers.getlist(MIN_EXPERTS_HEADER))
            temperature = wanted_temperature(headers.getlist(ROUTER_TEMPERATURE_HEADER))
        except RequestError as bad_header:
            await refusal(scope, bad_header)(scope, receive, send)
            return
        pools = tuple(headers.getlist(POOL_HEADER))
        context = RequestContext(pools, wants, least, temperature)
        self._enter(is_counted)
        try:
            with entered(context):
                await Answer(scope, receive, send, context).run(self.app)
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
