"""The state of one request, shared by the layers around vLLM's app and the generation hook."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from emo_serve.errors import EmoServeError
from emo_serve.server.asgi.coverage import CoverageReport
from emo_serve.server.coverage import CoverageSum

__all__ = ["EngineRequest", "RequestContext", "current_request", "entered"]


@dataclass(eq=False)
class EngineRequest:
    """One running engine request: its task, how many completions it generates, and its reader.

    `reader` is the task that last asked for an output; None before the first.
    """

    task: asyncio.Task[None]
    num_sequences: int
    reader: asyncio.Task[Any] | None = None

    @property
    def is_read(self) -> bool:
        """Tell whether a task other than the current one may still ask for outputs."""
        reader = self.reader
        return reader is not None and not reader.done() and reader is not asyncio.current_task()


@dataclass
class RequestContext:
    """One HTTP request, from its headers to the end of its answer.

    The lists have one entry per engine request; `is_asked` is set with the first. `admissions` are
    futures: None once the pool is leased, or the error that refuses it. `pool_names` are the pools
    they run in. `coverages`, used only if `wants_coverage`, are futures of their coverage (None if
    no token was routed), which must be resolved however the request ends. `retry_after_seconds` is
    set with a 503.

    `min_experts` is how small a part of its pool may serve it, None if the client does not say.
    `router_temperature` is what its tokens route at, None for the pool's own.
    `begun` names, by the pool asked for, the size that serves the request; it keeps that.

    `running` are the engine requests that have not ended; `is_under_way` once one has finished, so
    that further ones are steps of an admitted request. `cut_by` is the error that ended them all.
    `text_size` is what the request has had tokenized, in characters, and detokenized, in tokens.
    `on_entered` is called once the request no longer keeps the event loop busy; see `asgi.entry`.
    """

    pool_headers: tuple[str, ...] = ()
    wants_coverage: bool = False
    min_experts: int | None = None
    router_temperature: float | None = None
    retry_after_seconds: int | None = None
    admissions: list[asyncio.Future[EmoServeError | None]] = field(default_factory=list)
    begun: dict[str, str] = field(default_factory=dict)
    pool_names: list[str] = field(default_factory=list)
    coverages: list[asyncio.Future[CoverageSum | None]] = field(default_factory=list)
    running: set[EngineRequest] = field(default_factory=set)
    is_under_way: bool = False
    text_size: int = 0
    cut_by: EmoServeError | None = None
    is_asked: asyncio.Event = field(default_factory=asyncio.Event)
    is_refusal_logged: bool = False
    on_entered: Callable[[], None] = lambda: None

    @property
    def refused_by(self) -> EmoServeError | None:
        """Return the error that has refused the request, or cut it; None if there is none yet."""
        known = (admission.result() for admission in self.admissions if admission.done())
        return self.cut_by or next(filter(None, known), None)

    def admission(self) -> asyncio.Future[EmoServeError | None]:
        """Add and return the admission of one more engine request."""
        admission: asyncio.Future[EmoServeError | None]
        admission = asyncio.get_running_loop().create_future()
        self.admissions.append(admission)
        self.is_asked.set()
        self.on_entered()
        return admission

    @property
    def num_sequences(self) -> int:
        """Return how many completions the running engine requests generate."""
        return sum(request.num_sequences for request in self.running)

    @property
    def pools(self) -> str:
        """Return the names of the pools that serve the request, each once, joined by commas."""
        return ", ".join(dict.fromkeys(self.pool_names))

    def end(self) -> None:
        """Cancel the engine requests that are no longer read: the HTTP request has ended.

        A background response is read by its own task, and goes on.
        """
        for request in list(self.running):
            if not request.is_read:
                request.task.cancel()

    async def refusal(self) -> EmoServeError | None:
        """Wait until every engine request has its pool, or one is refused; return that error."""
        for admission in self.admissions:
            if (error := await asyncio.shield(admission)) is not None:
                return error
        return None

    async def report(self) -> CoverageReport:
        """Wait until every engine request has ended; return their combined coverage."""
        sums = [await asyncio.shield(coverage) for coverage in self.coverages]
        return CoverageReport.of(self.pools, sums)


_CURRENT: ContextVar[RequestContext | None] = ContextVar("emo_serve_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the HTTP request being handled, or an empty one outside requests."""
    return _CURRENT.get() or RequestContext()


@contextmanager
def entered(context: RequestContext) -> Iterator[None]:
    """Make this the current request inside the block."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)
