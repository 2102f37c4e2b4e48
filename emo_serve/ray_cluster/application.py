"""The Serve application: what Ray is told about the replicas and their router.

`build` is the import path of a Serve config; `emo-serve cluster config` prints one.
"""

from __future__ import annotations

from typing import Any

from ray.serve import Application
from ray.serve import deployment as deployment_of
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from emo_serve.ray_cluster.replica import Replica
from emo_serve.ray_cluster.settings import FleetSettings

__all__ = ["build", "build_application"]

_ROUTER = "emo_serve.ray_cluster.router.PoolAffinityRouter"
_POLICY = "emo_serve.ray_cluster.scaling:PoolPolicy"
_STATS_SECONDS = 0.5
_MOST_REQUESTS = 10_000  # a replica itself refuses what is too much, with Retry-After
_DRAIN_MARGIN_SECONDS = 10.0


def build(args: dict[str, Any]) -> Application:
    """Return the application of a Serve config's `args`, as `FleetSettings` has them."""
    return build_application(FleetSettings.from_args(args))


def build_application(settings: FleetSettings) -> Application:
    """Return the application for a fleet."""
    options: dict[str, Any] = {
        "name": "EmoServe",
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
    }
    if settings.min_replicas == settings.max_replicas:
        options["num_replicas"] = settings.min_replicas
    else:
        options["autoscaling_config"] = _autoscaling(settings)
    return deployment_of(**options)(Replica).bind(list(settings.argv))


def _actor_options(settings: FleetSettings) -> dict[str, Any]:
    variables = {"RAY_USAGE_STATS_ENABLED": "0"}
    if settings.cpus and not settings.gpus:
        # Several engines on one machine: none may bind its threads to cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        variables["OMP_NUM_THREADS"] = str(max(1, int(settings.cpus)))
    return {
        "num_cpus": settings.cpus,
        "num_gpus": settings.gpus,
        "runtime_env": {"env_vars": variables},
    }


def _autoscaling(settings: FleetSettings) -> AutoscalingConfig:
    least, most = settings.min_replicas, settings.max_replicas
    limits = {"min_replicas": least, "max_replicas": most}
    policy = AutoscalingPolicy(policy_function=_POLICY, policy_kwargs=limits)
    # The policy itself waits before it acts, so Ray must not wait again.
    return AutoscalingConfig(
        **limits, initial_replicas=least, policy=policy, upscale_delay_s=0.0, downscale_delay_s=0.0
    )
