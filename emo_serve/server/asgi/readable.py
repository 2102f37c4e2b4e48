"""Bodies that vLLM accepts and then fails on: refused with 400, before the answer begins.

Pure ASGI, inside `BodyLimit`, which hands on bodies as one message. Two kinds:

- JSON may hold half a surrogate pair ("\\ud800"), which is no character. vLLM finds out when it
  encodes the text for its engine or for the answer, which by then may have begun.
- A validator of a request's model may fail on a field of an unexpected type with something that is
  no validation error, and the JSON reader on one that is nested too deeply. vLLM's last handler
  answers 500 then, and the connection is closed behind it, also for the next request that the
  client or a proxy has sent on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.server.asgi.bodies import READING_METHODS, replay
from emo_serve.server.asgi.errors import error_response

__all__ = ["ReadableBody"]

_HALVES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
"""What may be half a pair: the escape may itself be escaped, which reading the JSON tells."""

_READING = {
    ("fastapi.dependencies.utils", "solve_dependencies"),  # before a route's own code runs
    # in /invocations, which reads its body itself
    ("starlette.requests", "json"),
    ("pydantic.type_adapter", "validate_python"),
    ("vllm.entrypoints.serve.elastic_ep.api_router", "scale_elastic_ep"),  # reads its body itself
}


class ReadableBody:
    """Wrap an ASGI app; what it cannot read is answered in the shape of the route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection, or refuse it with 400."""
        if scope["type"] != "http" or scope["method"] in READING_METHODS:
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        if (place := _half_a_pair(body)) is not None:
            message = (
                f"{place} has half a surrogate pair, which is no character; expected text that"
                " UTF-8 can hold"
            )
            await error_response(scope, HTTPStatus.BAD_REQUEST, message)(scope, receive, send)
            return
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, replay(body, receive), send_and_note)
        except Exception as error:
            if has_begun or not _is_from_reading(error.__traceback__):
                raise
            message = (
                f"the body cannot be read ({type(error).__name__}: {error}); a field has a value of"
                " another type than /openapi.json says, or is nested too deeply"
            )
            await error_response(scope, HTTPStatus.BAD_REQUEST, message)(scope, receive, send)


def _half_a_pair(body: bytes) -> str | None:
    """Return the first place of the JSON that has one; None for JSON without, and for no JSON."""
    if _HALVES.search(body) is None:
        return None
    try:
        return next(_places(json.loads(body), "body"), None)
    except (ValueError, RecursionError):  # the route says what is wrong with it
        return None


def _places(node: Any, place: str) -> Iterator[str]:
    if isinstance(node, str):
        if any("\ud800" <= letter <= "\udfff" for letter in node):
            yield place
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _places(key, f"a key of {place}")
            yield from _places(value, f"{place}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _places(value, f"{place}[{index}]")


def _is_from_reading(trace: TracebackType | None) -> bool:
    while trace is not None:
        frame = trace.tb_frame
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _READING:
            return True
        trace = trace.tb_next
    return False
