"""The Serve application: what Ray is told about the replicas and their router.

`build` is the import path of a Serve config; `emo-serve cluster config` prints one.
"""

from __future__ import annotations

from typing import Any

from ray.serve import Application
from ray.serve import deployment as deployment_of
from ray.serve.config import RequestRouterConfig

from emo_serve.ray_cluster.manifests import DEPLOYMENT
from emo_serve.ray_cluster.replica import Replica
from emo_serve.ray_cluster.settings import FleetSettings

__all__ = ["build", "build_application"]

_ROUTER = "emo_serve.ray_cluster.router.PoolAffinityRouter"
_STATS_SECONDS = 0.5
_MOST_REQUESTS = 10_000  # a replica itself refuses what is too much, with Retry-After
_DRAIN_MARGIN_SECONDS = 10.0


def build(args: dict[str, Any]) -> Application:
    """Return the application of a Serve config's `args`, as `FleetSettings` has them."""
    return build_application(FleetSettings.from_args(args))


def build_application(settings: FleetSettings, **changed: Any) -> Application:
    """Return the application for a fleet; `changed` replaces options of its deployment."""
    options = {**_options(settings), **changed}
    return deployment_of(**options)(Replica).bind(list(settings.argv))


def _options(settings: FleetSettings) -> dict[str, Any]:
    return {
        "name": DEPLOYMENT,
        "max_ongoing_requests": _MOST_REQUESTS,
        "request_router_config": RequestRouterConfig(
            request_router_class=_ROUTER, request_routing_stats_period_s=_STATS_SECONDS
        ),
        # Streams that run longer are cut; the engine needs a moment after them.
        "graceful_shutdown_timeout_s": settings.drain_seconds + _DRAIN_MARGIN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": _actor_options(settings),
        **settings.replica_options(),
    }


def _actor_options(settings: FleetSettings) -> dict[str, Any]:
    variables = {"RAY_USAGE_STATS_ENABLED": "0"}
    if settings.cpus and not settings.gpus:
        # Several engines on one machine: none may bind its threads to cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        variables["OMP_NUM_THREADS"] = str(max(1, int(settings.cpus)))
    reserved: dict[str, Any] = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    if settings.memory_bytes:
        reserved["memory"] = settings.memory_bytes
    return {**reserved, "runtime_env": {"env_vars": variables}}
