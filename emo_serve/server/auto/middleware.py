"""`model: "auto"`: read the prompt, choose its pool, and write that pool's name into the request.

Pure ASGI inside admission and `BodyLimit`, which hands on bodies as one message, and around vLLM's
app. Only a generating POST that asks for `auto`, in its model or in the x-emo-pool header, is
changed: its body gets the chosen pool's name as the model. So everything behind this layer,
including metrics and the answer's `model`, sees a request for that pool. Other requests to these
paths pass unchanged, and bodies for other paths are not read at all. Where there is nothing to
choose by, the default pool serves: an empty prompt, one that cannot be read, which vLLM refuses
best, or tokens that are only counted.

Each HTTP request gets one choice, however many prompts it has. The choice is cancelled if the
client disconnects. A few choices are made at a time, since each may ask the engine: it runs no more
probes than that beside the requests it has admitted.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.errors import EmoServeError, RequestError
from emo_serve.names import AUTO_POOL, BASE_POOL, ModelNames
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.asgi.bodies import replay
from emo_serve.server.asgi.context import current_request
from emo_serve.server.asgi.errors import reason_of, refusal, route_path
from emo_serve.server.auto.choice import PoolChooser
from emo_serve.server.auto.prompt_text import READERS, Prompt

__all__ = ["AutoObserver", "AutoPool"]

_T = TypeVar("_T")

_CHOICES_AT_ONCE = 8
_SIGNS = (AUTO_POOL.encode(), b"\\u00", b"\0")
"""A body that asks for `auto` has the word, its letters as JSON escapes, or zeros: it is UTF-16."""


class AutoObserver(Protocol):
    """What counts choices; PoolMetrics implements it."""

    def count_auto(self, pool: str, seconds: float) -> None:
        """Count one choice, which took `seconds`."""

    def count_refusal(self, reason: str) -> None:
        """Count a request that got no pool."""


class AutoPool:
    """Wrap an ASGI app; requests for `auto` reach it with a pool's name."""

    def __init__(
        self,
        app: ASGIApp,
        names: ModelNames,
        chooser: PoolChooser,
        observer: AutoObserver,
    ) -> None:
        self.app = app
        self._names, self._chooser, self._observer = names, chooser, observer
        self._choices = asyncio.Semaphore(_CHOICES_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        path = self._path(scope)
        if path not in READERS:
            await self.app(scope, receive, send)
            return
        body: bytes = (await receive())["body"]
        document = self._document(body)
        if document is None:
            await self.app(scope, replay(body, receive), send)
            return
        document["model"] = self._names.base[0]
        if prompt := READERS[path](document):
            start = time.monotonic()
            try:
                pool = await _unless_disconnected(receive, self._choose(prompt))
            except EmoServeError as error:
                self._observer.count_refusal(reason_of(error))
                await refusal(scope, error)(scope, receive, send)
                return
            if pool is None:  # the client has disconnected
                return
            self._observer.count_auto(pool.name, time.monotonic() - start)
            document["model"] = self._model_of(pool)
        current_request().pool_headers = ()
        body = json.dumps(document).encode()
        await self.app(_with_length(scope, len(body)), replay(body, receive), send)

    async def _choose(self, prompt: Prompt) -> ExpertPool:
        async with self._choices:
            return await self._chooser.choose(prompt)

    def _path(self, scope: Scope) -> str:
        """Return the path of a POST request, and "" for anything else."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return ""
        return route_path(scope)

    def _document(self, body: bytes) -> dict[str, Any] | None:
        """Return the request's JSON if it asks for `auto`, else None."""
        headers = current_request().pool_headers
        if not (headers or any(sign in body for sign in _SIGNS)):
            return None
        try:
            document = json.loads(body)
            model = document.get("model") if isinstance(document, dict) else 0
            if model is not None and not isinstance(model, str):
                return None
            return document if self._names.choose(model, headers) == AUTO_POOL else None
        except (ValueError, RecursionError, RequestError):
            return None

    def _model_of(self, pool: ExpertPool) -> str:
        """Return a model name for this pool; the base pool has none of its own."""
        if pool.name != BASE_POOL:
            return pool.name
        base = self._names.base[0]
        return base if self._names.default_pool == BASE_POOL else f"{base}:{BASE_POOL}"


async def _unless_disconnected(receive: Receive, work: Coroutine[object, object, _T]) -> _T | None:
    """Await work, or cancel it and return None when the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Wait until the client disconnects; its body is complete, so nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _with_length(scope: Scope, length: int) -> Scope:
    """Return a scope whose headers give the length of the new body, sent in one piece."""
    changed = dict(scope)
    headers = MutableHeaders(scope=changed)
    del headers["transfer-encoding"]
    headers["content-length"] = str(length)
    return changed
