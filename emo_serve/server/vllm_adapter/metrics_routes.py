"""GET /metrics in the place of vLLM's, and GET /metrics/routing for routers.

Both show the registry that vLLM shows, or with PROMETHEUS_MULTIPROC_DIR what is in the files of
that directory. The first adds our gauges, and its text is written in a thread, by one at a time; a
request that comes meanwhile waits, so that what it is told is never older than its question. The
second has only the few series that a router reads, because a router asks many times per second. To
write them takes less than to hand them to a thread, unless files have to be read for them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import Metric
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route
from vllm.v1.metrics.prometheus import get_prometheus_registry

from emo_serve.exposition import CONTENT_TYPE, Exposition, selected
from emo_serve.router_metrics import ROUTER_METRICS

__all__ = ["METRICS_PATH", "ROUTING_PATH", "add_metrics_routes", "metrics_registry"]

METRICS_PATH = "/metrics"
ROUTING_PATH = "/metrics/routing"


def metrics_registry() -> Any:
    """Return a registry whose counters and histograms /metrics shows."""
    return get_prometheus_registry()


def add_metrics_routes(
    app: FastAPI,
    gauges: Callable[[], Iterable[Metric]],
    pools: Callable[[], Metric],
) -> None:
    """Add both routes to vLLM's app; GET /metrics is answered by ours, vLLM's stays documented.

    `gauges` and `pools` are called on the event loop, where nothing that they read changes
    meanwhile; what `gauges` returns is iterated in a thread. `pools` is what routers read of pools,
    and is in both answers.
    """

    def everything() -> Callable[[], Iterable[Metric]]:
        ours = [pools()], gauges()
        return lambda: chain(metrics_registry().collect(), *ours)

    def for_routers() -> Callable[[], Iterable[Metric]]:
        ours = pools()
        return lambda: [ours, *selected(metrics_registry(), ROUTER_METRICS)]

    reads_files = "PROMETHEUS_MULTIPROC_DIR" in os.environ
    for path, endpoint in (
        (METRICS_PATH, _Endpoint(everything, in_thread=True)),
        (ROUTING_PATH, _Endpoint(for_routers, in_thread=reads_files)),
    ):
        app.router.routes.insert(0, Route(path, endpoint.answer, include_in_schema=False))


class _Endpoint:
    """Answer with metrics; `snapshot` returns, on the event loop, how to get them elsewhere."""

    def __init__(
        self, snapshot: Callable[[], Callable[[], Iterable[Metric]]], *, in_thread: bool
    ) -> None:
        self._snapshot = snapshot
        self._in_thread = in_thread
        self._exposition = Exposition() if in_thread else Exposition(pause=lambda: None)
        self._turn = asyncio.Lock()

    async def answer(self, _: Request) -> Response:
        """Return all metrics as text."""
        async with self._turn:
            families = self._snapshot()
            if self._in_thread:
                text = await run_in_threadpool(lambda: self._exposition.text(families()))
            else:
                text = self._exposition.text(families())
        return Response(text, media_type=CONTENT_TYPE)
