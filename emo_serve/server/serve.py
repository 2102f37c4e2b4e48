"""The server's life: plan, start the engine, load pools, answer, drain, stop.

One process answers HTTP and decides about pools; the engine's processes are vLLM's. SIGTERM starts
the drain: readiness turns 503, new work is refused, what runs or waits is finished, and the process
ends with status 0. A second signal ends the wait. (Ctrl-C in a terminal reaches the engine's
processes too, which end their requests at once.)
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse

from emo_serve.config import BASE_POOL, ServeSettings
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import EngineDead, PoolLoadFailed, PoolTooLarge, Unavailable
from emo_serve.metrics import PoolMetrics
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.policy import make_policy
from emo_serve.residency.slots import SlotTable
from emo_serve.server.asgi.admission import RequestGate
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.asgi.keys import KeyGuard
from emo_serve.server.auto.choice import make_chooser, read_auto_examples, text_of
from emo_serve.server.auto.middleware import AutoPool
from emo_serve.server.pool_admin import api as pools_api
from emo_serve.server.pool_admin.builder import PoolBuilder
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.request_log import RequestLog
from emo_serve.server.shutdown import StopSignals, drain
from emo_serve.server.startup.checkpoint import resolve_checkpoint
from emo_serve.server.startup.plan import StartPlan, make_plan
from emo_serve.server.startup.summary import PoolLine, ServerAddress, Summary, format_summary
from emo_serve.server.startup.unsupported_flags import refuse_unsupported
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.engine import PooledLLM, to_http_error
from emo_serve.server.vllm_adapter.openai import (
    bind_socket,
    build_http_app,
    create_http_server,
    dtype_bytes,
    metrics_registry,
    parse_serve_args,
    run_beside_server,
    start_engine,
)
from emo_serve.server.vllm_adapter.probe import RouterProbe
from emo_serve.server.vllm_adapter.worker_calls import EngineFacts, WorkerCalls

__all__ = ["DefaultModel", "run"]

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 10.0  # then the engine's processes are killed
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class DefaultModel:
    """What is served when no MODEL is given, and the vLLM flags' defaults for it alone."""

    name: str
    directory: Path
    pools_dir: Path
    flag_defaults: Mapping[str, object]


def run(argv: Sequence[str], announce: Callable[[str], None], default_model: DefaultModel) -> int:
    """Serve until a signal; return the exit status. `announce` gets the start-up summary.

    Raises ConfigError, before anything heavy is started, for flags that cannot work.
    """
    import uvloop

    args = parse_serve_args(argv, default_model.flag_defaults)
    settings = ServeSettings.from_args(args)
    refuse_unsupported(args)
    persists = settings.pools_dir is not None  # the shipped pools are not ours to change
    settings = _resolve_model(args, settings, default_model)
    checkpoint = Checkpoint.open(Path(args.model))  # first: it knows best what is not an EMO
    plan = make_plan(
        settings,
        checkpoint,
        args.served_model_name,
        dtype_bytes(args),
        args.tensor_parallel_size,
        persists=persists,
    )
    keys = _Keys.take(args, settings)
    examples = read_auto_examples(settings)
    with ExitStack() as stack:
        log = None
        if settings.request_log is not None:
            log = stack.enter_context(closing(RequestLog(settings.request_log)))
        parts = _Parts(args, settings, plan, checkpoint, keys, log, examples)
        return uvloop.run(_serve(parts, announce))


@dataclass(frozen=True)
class _Keys:
    """The keys clients and operators need; vLLM's own check gets all of them.

    `variable` is one to hold an API key in a shell, None without any.
    """

    api: tuple[str, ...]
    admin: tuple[str, ...]
    variable: str | None

    @classmethod
    def take(cls, args: argparse.Namespace, settings: ServeSettings) -> _Keys:
        variable = "EMO_SERVE_API_KEY" if args.api_key else "VLLM_API_KEY"
        given = args.api_key or [os.environ.get("VLLM_API_KEY", "")]
        api, admin = tuple(filter(None, given)), settings.admin_api_keys
        args.api_key = [*api, *admin] if api else None
        return cls(api, admin, variable if api else None)


@dataclass(frozen=True)
class _Parts:
    """What a start has decided before the engine is there."""

    args: argparse.Namespace
    settings: ServeSettings
    plan: StartPlan
    checkpoint: Checkpoint
    keys: _Keys
    request_log: RequestLog | None
    auto_examples: Mapping[str, Sequence[str]]


def _resolve_model(
    args: argparse.Namespace, settings: ServeSettings, default_model: DefaultModel
) -> ServeSettings:
    """Point `args.model` at a directory and name the model as the user did."""
    name = settings.model or default_model.name
    if settings.model is None:
        args.model = str(default_model.directory)
        pools_dir = settings.pools_dir or default_model.pools_dir
        settings = replace(settings, pools_dir=pools_dir)
    else:
        token = args.hf_token
        directory = resolve_checkpoint(name, args.revision, args.download_dir, token)
        args.model = str(directory)
    args.model_tag = args.model
    args.served_model_name = args.served_model_name or [name]
    return settings


async def _serve(parts: _Parts, announce: Callable[[str], None]) -> int:
    signal.signal(signal.SIGTERM, _abandon_start)  # until the drain takes over
    with closing(bind_socket(parts.args)) as sock:
        llm = start_engine(parts.args, parts.settings, parts.plan.num_slots)
        try:
            return await _Server(parts, llm).serve(sock, announce)
        finally:
            llm.shutdown(timeout=_SHUTDOWN_SECONDS)


def _abandon_start(number: int, _: object) -> None:
    """End at once, engine included: an exception raised here is lost in the engine's start-up."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


class _Server:
    """One server on one running engine."""

    def __init__(self, parts: _Parts, llm: PooledLLM) -> None:
        self.parts = parts
        self.args, self.settings, self.plan = parts.args, parts.settings, parts.plan
        self.llm = llm

    async def serve(self, sock: socket.socket, announce: Callable[[str], None]) -> int:
        """Load the pools, answer requests, drain; return the exit status."""
        signals = StopSignals(asyncio.get_running_loop())
        check = self.parts.checkpoint.check_experts
        calls = WorkerCalls(self._rpc, lambda: bool(self.llm.errored), check, _log_progress())
        facts = await calls.describe()
        _check_facts(facts, self.plan)
        metrics = PoolMetrics(
            metrics_registry(),
            [BASE_POOL, *self.plan.catalog.pools],
            REFUSAL_REASONS,
            lambda: service.snapshot(),
        )
        manager = self._manager(calls, facts, metrics)
        service = PoolService(
            self.plan.names,
            self.plan.base_pool,
            self.plan.catalog,
            manager,
            metrics,
            calls.usage_of if facts.records_routing else None,
        )
        coverage = CoverageBook(calls.read_coverage, metrics.observe_coverage)
        longest = self.llm.model_config.max_model_len - 1  # and one token that is generated
        probe = RouterProbe(manager, self.llm.run_probe, calls.read_mass, longest)
        await _load_pools(manager, self.plan)
        app = await build_http_app(
            self.llm, self.args, service, metrics, coverage, self.parts.request_log
        )
        await self._warm_up(service)
        chooser = await make_chooser(
            self.settings, service, probe, self.parts.checkpoint, self.parts.auto_examples
        )
        root_path = self.args.root_path
        gate = RequestGate(AutoPool(app, self.plan.names, chooser, metrics, root_path=root_path))
        builder = PoolBuilder(
            probe,
            self.parts.checkpoint,
            service,
            lambda name, examples: chooser.add_examples(name, list(map(text_of, examples))),
        )
        _add_routes(app, gate, service, self.llm, builder)
        guard = KeyGuard(
            gate,
            self.parts.keys.api,
            self.parts.keys.admin,
            self.settings.open_paths,
            root_path=root_path,
        )
        server = create_http_server(guard, app, self.args)
        summary = self._summarise(facts, service)
        watching = asyncio.create_task(coverage.run())
        try:
            return await self._answer(server, sock, gate, manager, signals, announce, summary)
        finally:
            watching.cancel()

    def _manager(
        self, calls: WorkerCalls, facts: EngineFacts, metrics: PoolMetrics
    ) -> ResidencyManager:
        return ResidencyManager(
            SlotTable(self.plan.experts_per_layer, self.plan.num_slots),
            self.settings.max_pools,
            calls,
            slot_bytes=facts.slot_bytes_all_ranks,
            policy=make_policy(self.settings.eviction_policy, self.plan.preferred),
            max_waiting=self.settings.max_waiting,
            load_deadline_seconds=self.settings.load_deadline_seconds,
            observer=metrics,
        )

    async def _warm_up(self, service: PoolService) -> None:
        logger.info("warming up")
        await self.llm.warm_up(min(service.pools, key=lambda pool: _readiness(service, pool)))

    async def _rpc(self, method: str, call_args: tuple[object, ...]) -> Sequence[dict[str, object]]:
        replies: Sequence[dict[str, object]]
        replies = await self.llm.collective_rpc(method, args=call_args)  # never timeout=: it kills
        return replies

    async def _answer(
        self,
        server: uvicorn.Server,
        sock: socket.socket,
        gate: RequestGate,
        manager: ResidencyManager,
        signals: StopSignals,
        announce: Callable[[str], None],
        summary: Summary,
    ) -> int:
        beside = run_beside_server(server, self.llm, self.args)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        stopping = asyncio.create_task(signals.first.wait())
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.02)
            if not serving.done():
                announce(format_summary(summary))
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drain_until_second(gate, manager, signals)
            server.should_exit = True
            await serving
        finally:
            for task in (*beside, stopping):
                task.cancel()
        return 0 if signals.first.is_set() else 1

    async def _drain_until_second(
        self, gate: RequestGate, manager: ResidencyManager, signals: StopSignals
    ) -> None:
        timeout = self.settings.drain_timeout_seconds
        logger.info(
            "draining: %d requests under way, up to %.0f s; a second signal ends the wait",
            gate.num_running,
            timeout,
        )
        draining = asyncio.create_task(drain(gate, manager, timeout))
        second = asyncio.create_task(signals.second.wait())
        await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
        if not (draining.done() and draining.result()):
            logger.warning("stopping with %d requests under way", gate.num_running)
        for task in (draining, second):
            task.cancel()

    def _summarise(self, facts: EngineFacts, service: PoolService) -> Summary:
        statuses = [service.status(pool) for pool in service.pools]
        lines = tuple(
            PoolLine(
                name=status.pool.name,
                experts_per_layer=tuple(map(len, status.pool.expert_ids)),
                state=_STATES[_readiness(service, status.pool)],
                is_default=status.is_default,
            )
            for status in statuses
        )
        return Summary(
            model=self.args.served_model_name[0],
            facts=facts,
            experts_per_layer=self.plan.experts_per_layer,
            slots_per_layer=self.plan.num_slots,
            pools_source=self.settings.pools_dir,
            pools=lines,
            refused=tuple(map(str, self.plan.catalog.refused)),
            address=_address(self.args, self.parts.keys),
            try_model=_model_to_try(service),
        )


# -- start-up --


def _check_facts(facts: EngineFacts, plan: StartPlan) -> None:
    """Refuse an engine that is not what the plan asked for."""
    expected = tuple(min(plan.num_slots, count) for count in plan.experts_per_layer if count)
    if facts.num_slots != expected:
        raise EngineDead(f"the engine has {facts.num_slots} slots; {expected} were asked for")
    if not facts.routes_by_pool:
        raise EngineDead("the engine's model runner does not hand pool rows to the model")


async def _load_pools(manager: ResidencyManager, plan: StartPlan) -> None:
    """Make the pinned pools resident, then others as long as there is room."""
    for pool in plan.pinned:
        await manager.load(pool, pin=True)
    for pool in plan.load_order:
        if not manager.fits_now(pool):
            logger.info(
                "pool %s is loaded when it is asked for: no room beside the others", pool.name
            )
            continue
        try:
            await manager.load(pool)
        except PoolLoadFailed:  # logged by the line; its requests will hear of it too
            continue


_STATES = ("resident", "loaded when asked for", "does not fit")


def _readiness(service: PoolService, pool: ExpertPool) -> int:
    """Return 0 for a resident pool, 1 for one that can be loaded, 2 for one that cannot."""
    if service.manager.is_resident(pool):
        return 0
    try:
        service.manager.check_admissible(pool)
    except (PoolTooLarge, Unavailable):
        return 2
    return 1


def _log_progress() -> Callable[[int, int], None]:
    """Return a listener that logs long loads every few seconds."""
    last = time.monotonic()

    def on_copied(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            logger.info("loading experts: %d of %d (%.0f %%)", done, total, 100 * done / total)

    return on_copied


def _address(args: argparse.Namespace, keys: _Keys) -> ServerAddress:
    return ServerAddress(
        host=args.host,
        port=args.port,
        uds=args.uds,
        is_tls=bool(args.ssl_keyfile and args.ssl_certfile),
        key_variable=keys.variable,
    )


def _model_to_try(service: PoolService) -> str:
    """Return a model name that can be answered: a resident pool's, else the readiest."""
    named = list(service.catalog.pools.values())
    if not named:
        return service.names.base[0]
    return min(named, key=lambda pool: _readiness(service, pool)).name


# -- routes --


def _add_routes(
    app: FastAPI,
    gate: RequestGate,
    service: PoolService,
    llm: PooledLLM,
    builder: PoolBuilder,
) -> None:
    router = APIRouter()

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Answer 200 while new requests are taken, 503 when draining or when the engine died."""
        is_ready = not gate.is_closed and not llm.errored
        return JSONResponse({"ready": is_ready}, status_code=200 if is_ready else 503)

    app.include_router(router)
    to_error = partial(to_http_error, param=None)
    app.include_router(pools_api.create_router(service, to_error, builder))
