"""One replica: the whole server inside a Ray actor, all but the socket and the signals.

Ray Serve calls the app for each request, asks `check_health` (a dead engine means a new replica)
and `record_routing_stats` (what the router knows), and calls `__del__` when the running requests
have ended. Replicas reach each other through a handle of their own deployment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from emo_serve.cluster.fleet import published
from emo_serve.cluster.shared import News, Stamp
from emo_serve.errors import EngineDead
from emo_serve.ray_cluster.fleet_routes import FleetRoutes
from emo_serve.ray_cluster.local_requests import LocalAnswer, LocalRequest
from emo_serve.ray_cluster.member import FleetMember
from emo_serve.ray_cluster.scaling import report

if TYPE_CHECKING:
    from emo_serve.server.startup.engine_output import EngineOutput
    from emo_serve.server.startup.launch import Keys, Launch
    from emo_serve.server.startup.progress import StartProgress

__all__ = ["Replica"]

_ASK_SECONDS = 600.0  # a load may have to wait until long requests end
_TELL_SECONDS = 10.0
_LOOK_SECONDS = 0.2
_LAST_WORDS_SECONDS = 1.0  # in which running requests get their errors


class _Ending:
    """What vLLM's error handler sets when the engine has died."""

    should_exit = False


class _RayPeers:
    """The running replicas of this deployment, by Ray's handle of it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._handle: DeploymentHandle | None = None

    async def ask(
        self, request: LocalRequest, replicas: Sequence[str] | None = None
    ) -> dict[str, LocalAnswer]:
        """Have the named replicas, None for all, answer a request."""
        named = None if replicas is None else list(replicas)
        told = await self._broadcast(_ASK_SECONDS, "ask", request, named)
        return {name: answer for name, answer in told if answer is not None}

    async def hear(self, news: Sequence[News]) -> None:
        """Tell news to all, and wait until they have acted on them."""
        await self._broadcast(_ASK_SECONDS, "hear", list(news))

    async def tell(self, stamps: Sequence[Stamp]) -> list[Sequence[News]]:
        """Return what each knows beyond the news with these stamps."""
        return await self._broadcast(_TELL_SECONDS, "tell", list(stamps))

    async def names(self) -> list[str]:
        """Return the names of all."""
        return await self._broadcast(_TELL_SECONDS, "name")

    async def _broadcast(self, seconds: float, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every running replica; those that die meanwhile are left out."""
        if self._handle is None:
            name, app = self._context.deployment, self._context.app_name
            self._handle = serve.get_deployment_handle(name, app_name=app)
        async with asyncio.timeout(seconds):
            called = self._handle.broadcast(method, *arguments)
            results = await called.results_async(return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                logging.getLogger(__name__).warning("a replica did not answer: %s", result)
        return [result for result in results if not isinstance(result, Exception)]


@serve.ingress()
class Replica:
    """Run one server with the flags of `emo-serve serve` in `argv`."""

    def __init__(self, argv: Sequence[str]) -> None:
        context = serve.get_replica_context()
        self._argv = list(argv)
        self._stack = ExitStack()
        self._beside: list[asyncio.Task[None]] = []
        self._peers = _RayPeers(context)
        self._member = FleetMember(context.replica_id.unique_id, self._peers)
        self._found = (0, 0)
        self._life: Any = None
        self._server: Any = None

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine and build the app; Ray sends requests here once this has returned."""
        from emo_serve.server.startup.quiet import be_quiet, is_quiet, log_to_stderr

        quiet = is_quiet(self._argv)
        if quiet:
            be_quiet()
        log_to_stderr()  # Ray passes it on
        from emo_serve.server.shipped import shipped_model
        from emo_serve.server.startup.engine_output import EngineOutput
        from emo_serve.server.startup.launch import prepare
        from emo_serve.server.startup.progress import StartProgress

        progress = StartProgress(sys.stderr)
        launch = prepare(self._argv, shipped_model(), progress)
        output = None
        if quiet:
            output = EngineOutput(notice=progress.notice)
            self._stack.callback(output.close)
        self._life = self._life_of(launch, progress, output)
        self._life.start()
        around = partial(FleetRoutes, member=self._member, peers=self._peers)
        self._server = await self._life.build(around)
        self._server.app.state.server = _Ending()
        if output is not None:
            output.started()
            self._stack.callback(output.ending)
        await self._join(launch.keys)
        self._beside = [
            *self._life.run_beside(),
            asyncio.create_task(self._member.keep_in_step()),
            asyncio.create_task(self._end_with_engine()),
        ]
        progress.finished()
        return self._server.app

    def _life_of(self, launch: Launch, progress: StartProgress, output: EngineOutput | None) -> Any:
        """Return the server's life, which ends with this object's stack."""
        from emo_serve.server.life import ServerLife
        from emo_serve.server.startup.run_directory import opened_run_directory
        from emo_serve.server.vllm_adapter.request_log import RequestLog

        request_log, path = None, launch.settings.request_log
        if path is not None:
            mine = path.with_name(f"{path.stem}-{self._member.name}{path.suffix}")
            request_log = self._stack.enter_context(closing(RequestLog(mine)))
        directory = self._stack.enter_context(opened_run_directory())
        life = ServerLife(launch, progress, directory, request_log, output)
        self._stack.callback(life.stop)
        return life

    async def _join(self, keys: Keys) -> None:
        """Take over the fleet's pools; the first replicas find no fleet."""
        key = next(iter((*keys.admin, *keys.api)), None)
        try:
            await self._member.join(self._server.service, self._server.app, key)
        except (RayServeException, TimeoutError):
            logging.getLogger(__name__).info("no other replica runs yet")

    async def _end_with_engine(self) -> None:
        """End this process soon after its engine, so that no request is sent here any more.

        Ray would notice by `check_health`, but only at the third failure.
        """
        while not self._life.has_died:
            await asyncio.sleep(_LOOK_SECONDS)
        logging.getLogger(__name__).error("the engine has died; Ray starts another replica")
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        os._exit(1)

    # -- what Ray asks --

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return what routers know of this replica."""
        from emo_serve.server.pool_admin.at_hand import at_hand

        service, manager = self._server.service, self._server.manager
        found = at_hand(service.lookup, manager)
        limits = manager.limits
        return published(
            pools=[pool.name for pool in (*found.resident, *found.awaited)],
            fits=[pool.name for pool in found.absent if manager.fits_now(pool)],
            known=[pool.name for pool in service.lookup.named],
            names=service.lookup.names,
            concurrency=1 if limits is None else limits.max_running,
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaler knows of this replica."""
        overview = self._server.service.statuses.overview()
        hits = sum(status.use.hits for status in overview.pools)
        misses = sum(status.use.misses for status in overview.pools)
        before, self._found = self._found, (hits, misses)
        limits, stats = self._server.manager.limits, overview.stats
        return report(
            running=stats.running_requests,
            waiting_for_loads=stats.waiting_requests,
            hits=max(0, hits - before[0]),  # a union that is no longer in use is not listed
            misses=max(0, misses - before[1]),
            concurrency=1 if limits is None else limits.max_running,
        )

    async def check_health(self) -> None:
        """Raise EngineDead if this replica must be replaced."""
        if self._life is not None and self._life.has_died:
            raise EngineDead("the engine has died")

    async def __del__(self) -> None:
        """End the engine; Ray calls this once, when no request is running any more."""
        for task in self._beside:
            task.cancel()
        self._stack.close()

    # -- what other replicas ask --

    async def ask(
        self, request: LocalRequest, replicas: Sequence[str] | None
    ) -> tuple[str, LocalAnswer | None]:
        """Answer a request, if this replica is asked; return its name with the answer."""
        name = self._member.name
        is_asked = replicas is None or name in replicas
        return name, await self._member.ask(request) if is_asked else None

    async def hear(self, news: Sequence[News]) -> None:
        """Act on news of changes that were made elsewhere."""
        await self._member.hear(news)

    async def tell(self, stamps: Sequence[Stamp]) -> Sequence[News]:
        """Return what this replica knows beyond the news with these stamps."""
        return self._member.tell(stamps)

    async def name(self) -> str:
        """Return this replica's name."""
        return self._member.name
