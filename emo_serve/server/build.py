"""Build one server from a Launch and a running engine: the one place that knows all its parts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse

from emo_serve.errors import (
    EngineDead,
    LoadDeadlineExceeded,
    PoolLoadFailed,
    PoolTooLarge,
    Unavailable,
)
from emo_serve.metrics import PoolMetrics, gauges
from emo_serve.names import BASE_POOL
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.backlog import BacklogLimits
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.policy import make_policy
from emo_serve.residency.slots import SlotTable
from emo_serve.router_metrics import pools_family
from emo_serve.server.access import create_access_router
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.asgi.keys import KeyGuard
from emo_serve.server.auto.candidates import Candidates
from emo_serve.server.auto.choice import make_chooser
from emo_serve.server.auto.learned import LearnedPools, learn
from emo_serve.server.console.routes import CONSOLE_PATHS, create_console_router
from emo_serve.server.health import Health, child_processes, stopped_among
from emo_serve.server.layers import Around, put_layers, unchanged
from emo_serve.server.pool_admin.activity import PoolActivity
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.at_hand import pools_at_hand
from emo_serve.server.pool_admin.builder import PoolBuilder
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.live import create_live_router
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.pool_admin.nested import PoolSizes
from emo_serve.server.pool_admin.residency import NamedResidency
from emo_serve.server.pool_admin.responses import READY_RESPONSES
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.router_probe import RouterProbe
from emo_serve.server.routes import add_routes
from emo_serve.server.startup.address import ServerAddress
from emo_serve.server.startup.launch import Launch
from emo_serve.server.startup.plan import StartPlan
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.summary import PoolLine, Summary
from emo_serve.server.vllm_adapter.capacity import backlog_limits, cache_tokens, max_sequences
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.engine import OwnRequests, has_work, note_steps
from emo_serve.server.vllm_adapter.generation import PooledLLM, to_http_error
from emo_serve.server.vllm_adapter.metrics_routes import add_metrics_routes, metrics_registry
from emo_serve.server.vllm_adapter.openai import build_http_app
from emo_serve.server.vllm_adapter.request_log import RequestLog
from emo_serve.server.vllm_adapter.spans import trace_requests
from emo_serve.server.vllm_adapter.tokenizer import EngineTokenizer
from emo_serve.server.vllm_adapter.worker_calls import EngineFacts, WorkerCalls

__all__ = ["Server", "build_server"]

logger = logging.getLogger(__name__)

_STATES = ("resident", "loaded on request", "streamed, slowly", "does not fit")


@dataclass(frozen=True)
class Server:
    """What answers requests.

    Before the first one, `app.state.server` must be something with a `should_exit`, which vLLM sets
    when the engine has died, and whoever stops the server before it does.
    """

    app: FastAPI
    llm: PooledLLM
    service: PoolService
    admission: Admission
    manager: ResidencyManager
    coverage: CoverageBook
    health: Health
    summary: Summary


@dataclass(frozen=True)
class _PoolParts:
    """The parts that decide about pools; those of the start are loaded."""

    calls: WorkerCalls
    facts: EngineFacts
    metrics: PoolMetrics
    activity: PoolActivity
    manager: ResidencyManager
    service: PoolService


async def build_server(
    launch: Launch,
    engine: Any,
    request_log: RequestLog | None,
    progress: StartProgress,
    around: Around = unchanged,
) -> Server:
    """Build the server on vLLM's AsyncLLM and load the pools of the start.

    Raises EngineDead, ConfigError for pools named like the model, and PoolLoadFailed for a pinned
    pool that cannot be read.
    """
    pools = await _start_pools(launch, engine, progress)
    args, manager, service = launch.args, pools.manager, pools.service
    coverage = CoverageBook(pools.calls.read_coverage, partial(_observe_coverage, pools))
    llm = PooledLLM(
        engine,
        service.residency,
        pools.metrics,
        coverage,
        request_log,
        trace_requests(engine),
        honours_priority=args.scheduling_policy == "priority",
        max_sequences=max_sequences(engine),
    )
    limits = manager.limits
    max_prompts = None if limits is None else limits.max_alone
    app = await build_http_app(llm, args, service.lookup, pools.metrics, max_prompts)
    own = OwnRequests(engine)
    progress.stage("warming up")
    # vLLM's part of /openapi.json takes seconds the first time; made here, it holds up no request.
    await asyncio.gather(_warm_up(own, manager, service.lookup), asyncio.to_thread(app.openapi))
    address = ServerAddress.of(args, launch.keys.variable)
    admission, health = await _wrap_app(
        app, llm, own, engine, launch, pools, around, is_local=address.is_local
    )
    summary = _summarise(launch, engine, pools, address)
    return Server(app, llm, service, admission, manager, coverage, health, summary)


async def _start_pools(launch: Launch, engine: Any, progress: StartProgress) -> _PoolParts:
    """Check the engine against the plan, and load the pools of the start."""
    plan = launch.plan
    registry = metrics_registry()
    metrics = PoolMetrics(registry, [BASE_POOL, *plan.catalog.pools], REFUSAL_REASONS)
    calls = WorkerCalls(
        lambda method, call_args: engine.collective_rpc(method, args=call_args),  # no timeout=
        lambda: bool(engine.errored),
        launch.checkpoint.check_experts,
        progress.copied,
        metrics.count_streamed,
    )
    facts = await calls.describe()
    _check_facts(facts, plan)
    limits = backlog_limits(engine, launch.settings.max_queued)
    logger.info(
        "the engine runs %d completions at once; %d more may be queued",
        limits.max_running,
        limits.max_queued,
    )
    activity = PoolActivity(metrics)
    manager = _manager(launch, calls, facts, limits, activity)
    service = PoolService.over(
        plan.names,
        plan.base_pool,
        plan.catalog,
        manager,
        metrics,
        calls.usage_of if facts.records_routing else None,
        activity,
        launch.settings.elastic_min_experts,
        launch.settings.router_temperatures,
    )
    progress.stage("loading experts")
    await _load_pools(manager, service.residency, plan)
    return _PoolParts(calls, facts, metrics, activity, manager, service)


async def _wrap_app(
    app: FastAPI,
    llm: PooledLLM,
    own: OwnRequests,
    engine: Any,
    launch: Launch,
    pools: _PoolParts,
    around: Around,
    *,
    is_local: bool,
) -> tuple[Admission, Health]:
    """Put our layers around all routes of vLLM's app, and add our own routes to it."""
    args, checkpoint, service = launch.args, launch.checkpoint, pools.service
    longest = engine.model_config.max_model_len - 1  # and one token that is generated
    directory = launch.settings.pools_dir if launch.plan.catalog.persists else None
    learned = LearnedPools(directory, keeps_examples=launch.settings.keep_examples)
    probe = RouterProbe(pools.manager, own.run_probe, pools.calls.read_mass, longest)
    tokenizer = EngineTokenizer(engine.renderer, args)
    chooser = await make_chooser(
        launch.settings,
        Candidates(service.lookup, pools.manager),
        service.temporary,
        probe,
        tokenizer,
        checkpoint.facts,
        launch.auto_examples,
        lambda: learned.read(launch.plan.catalog.pools),
    )
    service.definitions.when_removed(learned.forget)
    guard = partial(
        KeyGuard,
        api_keys=launch.keys.api,
        admin_keys=launch.keys.admin,
        open_paths=(*launch.settings.open_paths, *CONSOLE_PATHS),
        is_local=is_local,
    )
    names, most = launch.plan.names, launch.settings.max_body_bytes
    admission = put_layers(app, guard, names, chooser, pools.metrics, most, around)
    builder = PoolBuilder(
        probe,
        checkpoint,
        service,
        pools.manager,
        tokenizer,
        partial(learn, chooser, learned),
    )
    health = Health(
        is_draining=lambda: admission.is_closed,
        is_dead=lambda: bool(engine.errored),
        has_work=lambda: has_work(engine),
        step_deadline_seconds=launch.settings.step_deadline_seconds,
        observe_lag=pools.metrics.observe_lag,
        find_stopped=partial(stopped_among, child_processes()),
    )
    note_steps(engine, health.note_step)
    add_metrics_routes(
        app,
        lambda: gauges(service.statuses.snapshot(), health.step_age_seconds()),
        lambda: pools_family(pools_at_hand(service.lookup, pools.manager), time.time()),
    )
    feed = ResidencyFeed(service.statuses, lambda: app.state.server.should_exit)
    _add_routes(app, health, service, builder, feed)
    return admission, health


# -- parts --


def _check_facts(facts: EngineFacts, plan: StartPlan) -> None:
    """Raise EngineDead for an engine that is not what the plan asked for."""
    expected = tuple(min(plan.num_slots, count) for count in plan.experts_per_layer if count)
    if facts.num_slots != expected:
        raise EngineDead(
            f"the engine has {facts.num_slots} slots per MoE layer, expected {expected}"
        )
    if not facts.routes_by_pool:
        raise EngineDead("the engine's model runner does not hand pool rows to the model")


def _manager(
    launch: Launch,
    calls: WorkerCalls,
    facts: EngineFacts,
    limits: BacklogLimits,
    activity: PoolActivity,
) -> ResidencyManager:
    settings, plan = launch.settings, launch.plan
    least, sizes = settings.elastic_min_experts, PoolSizes(plan.catalog)
    return ResidencyManager(
        SlotTable(plan.experts_per_layer, plan.num_slots),
        settings.max_pools,
        calls,
        slot_bytes=facts.slot_bytes_all_ranks,
        policy=make_policy(settings.eviction_policy, plan.preferred),
        max_waiting=settings.max_waiting,
        limits=limits,
        load_deadline_seconds=settings.load_deadline_seconds,
        observer=activity,
        shrink_to=partial(sizes.of, least=least) if least else None,
        may_stream=plan.stream_slots > 0,
    )


async def _load_pools(
    manager: ResidencyManager, residency: NamedResidency, plan: StartPlan
) -> None:
    """Make the pinned pools resident, then the others while there is room."""
    for pool in plan.pinned:
        await _at_start(partial(residency.load, pool.name, pin=True))
    for pool in plan.load_order:
        if not manager.fits_now(pool):
            logger.info(
                "pool %s will be loaded on request: there is no room beside the others", pool.name
            )
            continue
        try:
            await _at_start(partial(manager.load, pool))
        except PoolLoadFailed:  # logged already; requests for it get the error too
            continue


async def _at_start(load: Callable[[], Awaitable[object]]) -> None:
    """Load a pool however long it takes: --load-deadline is for those who wait to be answered."""
    while True:
        with suppress(LoadDeadlineExceeded):  # the load goes on
            await load()
            return


async def _warm_up(own: OwnRequests, manager: ResidencyManager, lookup: PoolLookup) -> None:
    pool = min(lookup.pools, key=partial(_readiness, manager))
    # A request may not wait for it with --max-waiting 0.
    await _at_start(partial(manager.load, pool))
    async with manager.lease(pool, is_own=True) as lease:
        await own.warm_up(pool, lease.row)


def _observe_coverage(pools: _PoolParts, pool: str, share: float) -> None:
    pools.metrics.observe_coverage(pool, share)
    pools.activity.add_coverage(pool, share)


def _add_routes(
    app: FastAPI,
    health: Health,
    service: PoolService,
    builder: PoolBuilder,
    feed: ResidencyFeed,
) -> None:
    router = APIRouter()

    @router.get("/ready", responses=READY_RESPONSES)
    async def ready() -> JSONResponse:
        """Answer 200 while new requests should come here; otherwise 503 with the reason."""
        if (reason := health.why_not_ready()) is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": reason}, status_code=503)

    as_http_error = partial(to_http_error, param=None)
    router.include_router(create_router(service, as_http_error, builder))
    router.include_router(create_live_router(service.statuses, feed, as_http_error))
    router.include_router(create_access_router())
    router.include_router(create_console_router())
    add_routes(app, router)


# -- summary --


def _summarise(launch: Launch, engine: Any, pools: _PoolParts, address: ServerAddress) -> Summary:
    plan, manager, service = launch.plan, pools.manager, pools.service
    lookup = service.lookup
    statuses = [service.statuses.of(pool) for pool in lookup.pools]
    lines = tuple(
        PoolLine(
            name=status.pool.name,
            experts_per_layer=tuple(map(len, status.pool.expert_ids)),
            state=_STATES[_readiness(manager, status.pool)],
            is_default=status.is_default,
        )
        for status in statuses
    )
    return Summary(
        model=launch.args.served_model_name[0],
        facts=pools.facts,
        memory=plan.memory,
        cache_tokens=cache_tokens(engine),
        max_model_len=engine.model_config.max_model_len,
        experts_per_layer=plan.experts_per_layer,
        slots_per_layer=plan.num_slots,
        stream_slots=plan.stream_slots,
        pools_source=launch.settings.pools_dir,
        pools=lines,
        refused=tuple(map(str, plan.catalog.refused)),
        address=address,
        try_model=min(lookup.named, key=partial(_readiness, manager)).name
        if lookup.named
        else lookup.names.base[0],
    )


def _readiness(manager: ResidencyManager, pool: ExpertPool) -> int:
    """Return the place in _STATES of a pool's state."""
    if manager.is_resident(pool):
        return 0
    try:
        manager.check_admissible(pool)
    except (PoolTooLarge, Unavailable):
        return 3
    return 2 if manager.is_streamed(pool) else 1
