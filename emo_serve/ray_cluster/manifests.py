"""A fleet as configuration: for `serve deploy`, and for KubeRay's RayService."""

from __future__ import annotations

from typing import Any

from emo_serve.ray_cluster.environment import VARIABLES
from emo_serve.ray_cluster.settings import FleetSettings

__all__ = ["APPLICATION", "DEPLOYMENT", "IMPORT_PATH", "ray_service", "serve_config"]

APPLICATION = "emo-serve"
DEPLOYMENT = "EmoServe"
IMPORT_PATH = "emo_serve.ray_cluster.application:build"
_RAY_VERSION = "2.60.0"

_CPUS_PER_GPU = 4  # one rank's engine and worker, and the front end
_MEMORY_BYTES = 16 * 2**30

_HEAD = {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}


def serve_config(settings: FleetSettings, host: str, port: int) -> dict[str, Any]:
    """Return the document of a Serve config file.

    The number of replicas stands beside the deployment's name, as Serve users know it: when it
    alone changes, Ray starts or ends replicas; when `args` change, it replaces all of them.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.to_args(),
                "deployments": [{"name": DEPLOYMENT, **settings.replica_options()}],
            }
        ],
    }


def ray_service(settings: FleetSettings, config: str, image: str, port: int) -> dict[str, Any]:
    """Return a RayService manifest; `config` is the text of the Serve config.

    Each worker pod has room for one replica.
    """
    least, most = settings.min_replicas, settings.max_replicas
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": APPLICATION},
        "spec": {
            "serveConfigV2": config,
            "rayClusterConfig": {
                "rayVersion": _RAY_VERSION,
                "enableInTreeAutoscaling": least != most,
                "headGroupSpec": {
                    # no replica fits there: the head only directs
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod("ray-head", image, _HEAD, port),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "replicas",
                        "replicas": least,
                        "minReplicas": least,
                        "maxReplicas": most,
                        "rayStartParams": {},
                        "template": _pod("ray-worker", image, _resources(settings), port),
                    }
                ],
            },
        },
    }


def _pod(name: str, image: str, resources: dict[str, Any], port: int) -> dict[str, Any]:
    variables = [{"name": key, "value": value} for key, value in VARIABLES.items()]
    container = {
        "name": name,
        "image": image,
        "env": variables,
        "ports": [{"name": "serve", "containerPort": port}],
        "resources": resources,
    }
    return {"spec": {"containers": [container]}}


def _resources(settings: FleetSettings) -> dict[str, Any]:
    cpus = settings.cpus or _CPUS_PER_GPU * settings.gpus
    memory = settings.memory_bytes or _MEMORY_BYTES
    amounts = {"cpu": f"{max(1, round(cpus))}", "memory": f"{memory // 2**20}Mi"}
    if settings.gpus:
        amounts["nvidia.com/gpu"] = f"{max(1, round(settings.gpus))}"
    return {"requests": amounts, "limits": dict(amounts)}
