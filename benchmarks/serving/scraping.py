"""What a scrape of /metrics costs the event loop on which every stream is served.

No engine and no sockets: the routes of a server's app are called on a loop that is never idle. A
task yields to the loop without a pause and notes the time between its turns, as streams would feel
it. Windows with one scrape at their beginning alternate with windows without any. What a scrape
costs is the longest time without a turn, and the time that the task lost in all: its turns in
windows with a scrape against those without.

vLLM's metrics are those of an engine of the shipped model; pools are made up, of the released
model's size, and as many are resident as fit. `at once` is what `/metrics` did before: the gauges
written on the loop, all else by prometheus_client in one piece, in a thread.

    python -m benchmarks.serving.scraping
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.v1.metrics.loggers import PrometheusStatLogger

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.residency.traces import released_pools
from emo_serve import demo
from emo_serve.facts import MoeLayer
from emo_serve.metrics import PoolMetrics, gauges, register_gauges
from emo_serve.names import BASE_POOL, ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.ports import LoadReport
from emo_serve.residency.slots import SlotTable
from emo_serve.router_metrics import pools_family
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.pool_admin.at_hand import pools_at_hand
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.vllm_adapter.metrics_routes import (
    METRICS_PATH,
    ROUTING_PATH,
    add_metrics_routes,
    metrics_registry,
)

AT_ONCE = "/at-once"
PATHS = {AT_ONCE: "/metrics at once", METRICS_PATH: METRICS_PATH, ROUTING_PATH: ROUTING_PATH}
WINDOW_SECONDS = 0.08  # longer than any scrape takes beside a busy loop


class _Engine:
    """A PoolEngine that has loaded before it is asked."""

    def check_readable(self, copies: object) -> None:
        """Find every file in order."""

    async def make_resident(
        self, row: int, expert_ids: Any, temperature: float, copies: Any
    ) -> LoadReport:
        """Copy nothing."""
        return LoadReport(sum(map(len, expert_ids)), len(copies), 0, 0, 0, 0.0)


async def make_service(
    num_pools: int, slots: int, metrics: PoolMetrics
) -> tuple[PoolService, ResidencyManager]:
    """Return a service over made-up pools, as many of them resident as fit."""
    made = released_pools(count=num_pools)
    layers = tuple(MoeLayer(count, 1, (), 8) for count in made.experts_per_layer)
    manager = ResidencyManager(
        SlotTable(made.experts_per_layer, slots),
        num_pools + 1,
        _Engine(),
        slot_bytes=made.slot_bytes,
    )
    service = PoolService.over(
        ModelNames(("emo", "org/emo")),
        ExpertPool.base(layers),
        PoolCatalog(tuple(made.pools.values()), layers),
        manager,
        metrics,
    )
    for pool in service.lookup.named:
        if manager.fits_now(pool):
            await manager.load(pool)
    names = pools_at_hand(service.lookup, manager).resident
    print(f"{num_pools} pools; names told to routers: {len(names)}")
    return service, manager


async def make_app(num_pools: int, slots: int) -> FastAPI:
    """Return an app with the routes to measure."""
    app = FastAPI()
    attach_router(app)
    PrometheusStatLogger(
        EngineArgs(model=str(demo.model_dir()), enforce_eager=True).create_engine_config(), [0]
    )
    names = [BASE_POOL, *released_pools(count=num_pools).pools]
    metrics = PoolMetrics(metrics_registry(), names, REFUSAL_REASONS)
    service, manager = await make_service(num_pools, slots, metrics)
    (theirs,) = (
        route.endpoint
        for route in app.routes
        if isinstance(route, APIRoute) and route.path == METRICS_PATH
    )
    ours = CollectorRegistry()
    register_gauges(ours, service.statuses.snapshot, lambda: 0.0)

    async def at_once(request: Request) -> Response:
        text = generate_latest(ours)
        answer = await run_in_threadpool(theirs, request)
        return Response(bytes(answer.body) + text, media_type=answer.headers["content-type"])

    app.router.routes.insert(0, Route(AT_ONCE, at_once))
    add_metrics_routes(
        app,
        lambda: gauges(service.statuses.snapshot(), 0.0),
        lambda: pools_family(pools_at_hand(service.lookup, manager), time.time()),
    )
    return app


async def scrape(app: FastAPI, path: str) -> int:
    """Ask one route; return the bytes of its answer."""
    sizes: list[int] = []

    async def send(message: Any) -> None:
        sizes.append(len(message.get("body", b"")))
        assert message.get("status", 200) == 200

    async def receive() -> Any:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    await app.router(scope, receive, send)
    return sum(sizes)


async def window(work: Callable[[], Awaitable[object]] | None) -> tuple[int, float, float]:
    """Take turns for a while; return their number, the longest gap, and the work's seconds."""
    done_after = 0.0
    task = None
    start = last = time.perf_counter()

    async def timed() -> None:
        nonlocal done_after
        assert work is not None
        await work()
        done_after = time.perf_counter() - start

    if work is not None:
        task = asyncio.create_task(timed())
    turns, longest = 0, 0.0
    while last - start < WINDOW_SECONDS:
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest = max(longest, now - last)
        turns, last = turns + 1, now
    if task is not None:
        await task
    return turns, longest, done_after


async def measure(app: FastAPI, path: str, rounds: int) -> dict[str, Any]:
    """Return what a scrape of one path costs, in milliseconds."""
    size = await scrape(app, path)
    await scrape(app, path)
    rows = []
    for _ in steps(range(rounds), path):
        idle, idle_gap, _ = await window(None)
        turns, gap, seconds = await window(lambda: scrape(app, path))
        lost = WINDOW_SECONDS * (1 - turns / idle)
        rows.append([1e3 * lost, 1e3 * gap, 1e3 * idle_gap, 1e3 * seconds])
    lost, gap, idle_gap, seconds = zip(*rows, strict=True)
    return {
        "bytes": size,
        "lost_ms": quartiles(lost),
        "longest_gap_ms": quartiles(gap),
        "longest_gap_without_ms": quartiles(idle_gap),
        "answer_ms": quartiles(seconds),
    }


def quartiles(values: Any) -> list[float]:
    """Return the three quartiles."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


async def compare(num_pools: int, slots: int, rounds: int) -> dict[str, Any]:
    """Measure every path with so many pools."""
    app = await make_app(num_pools, slots)
    return {path: await measure(app, path, rounds) for path in PATHS}


def main() -> None:
    """Measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pools", type=int, default=10)
    parser.add_argument("--slots", type=int, default=64, help="per layer [64]")
    parser.add_argument("--rounds", type=int, default=200, help="windows of each kind [200]")
    args = parser.parse_args()
    found = asyncio.run(compare(args.pools, args.slots, args.rounds))
    print(
        "| path | kB | lost, ms (quartiles) | longest gap, ms | without a scrape | answered, ms |"
    )
    print("|---|---|---|---|---|---|")
    for path, row in found.items():
        cells = (
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*row[name])
            for name in ("lost_ms", "longest_gap_ms", "longest_gap_without_ms", "answer_ms")
        )
        print(f"| {PATHS[path]} | {row['bytes'] / 1e3:.1f} | {' | '.join(cells)} |")
    print(f"appended to {append_result('scraping', vars(args), found)}")


if __name__ == "__main__":
    main()
