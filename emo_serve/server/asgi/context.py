"""What the layers around vLLM's app and the generation hook tell each other about one request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from emo_serve.errors import EmoServeError
from emo_serve.server.asgi.coverage import CoverageReport
from emo_serve.server.coverage import CoverageSum

__all__ = ["RequestContext", "current_request", "entered"]


@dataclass
class RequestContext:
    """One HTTP request, from its headers to the end of its answer.

    The lists get one entry per engine request: `admissions` a future that holds None once its pool
    is leased, or the refusal; `pool_names` the pool it runs in; and, if `wants_coverage`,
    `coverages` a future of its coverage, which must be resolved however the request ends.
    """

    pool_headers: tuple[str, ...] = ()
    wants_coverage: bool = False
    retry_after_seconds: int | None = None
    admissions: list[asyncio.Future[EmoServeError | None]] = field(default_factory=list)
    pool_names: list[str] = field(default_factory=list)
    coverages: list[asyncio.Future[CoverageSum | None]] = field(default_factory=list)

    @property
    def pools(self) -> str:
        """Return the names of the pools that serve the request, each once; usually one."""
        return ", ".join(dict.fromkeys(self.pool_names))

    async def refusal(self) -> EmoServeError | None:
        """Wait until every engine request has its pool, or one cannot have it; return why not."""
        for admission in self.admissions:
            if (error := await asyncio.shield(admission)) is not None:
                return error
        return None

    async def report(self) -> CoverageReport:
        """Wait until every engine request has ended; return their coverage taken together."""
        sums = [await asyncio.shield(coverage) for coverage in self.coverages]
        return CoverageReport.of(self.pools, sums)


_CURRENT: ContextVar[RequestContext | None] = ContextVar("emo_serve_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the HTTP request being handled; an empty one outside of any."""
    return _CURRENT.get() or RequestContext()


@contextmanager
def entered(context: RequestContext) -> Iterator[None]:
    """Make this the current request inside the block."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)
