"""Run a fleet until a signal comes: on a Ray of this machine's own, or on one that is running."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from emo_serve.errors import ConfigError, EngineDead
from emo_serve.ray_cluster.application import build_application
from emo_serve.ray_cluster.manifests import APPLICATION
from emo_serve.ray_cluster.settings import FleetSettings
from emo_serve.server.startup.address import ServerAddress

__all__ = ["Build", "deploy", "run_fleet", "running_fleet"]

Build = Callable[[FleetSettings], serve.Application]
"""How the application is made of a fleet's settings."""

_OBJECT_STORE_BYTES = 128 * 2**20  # requests and answers do not go through it
_STOP_SECONDS = 30.0  # beyond the drain, for Ray to end the replicas
_ERROR = re.compile(r"emo_serve\.errors\.\w+: |(?=\w+(\.\w+)*Error: )")


def run_fleet(
    settings: FleetSettings,
    listening: ServerAddress,
    announce: Callable[[str], None],
    address: str | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain; return the exit status.

    Without `address`, starts a Ray on loopback that ends with this process. Raises ConfigError for
    a port that is taken, and EngineDead if the replicas do not start.
    """
    stopping = threading.Event()
    with running_fleet(settings, listening, address):
        for number in (signal.SIGTERM, signal.SIGINT):  # until here, a signal ends the start
            signal.signal(number, lambda *_: stopping.set())
        announce(_summary(settings, listening))
        stopping.wait()
        announce("emo-serve: draining the replicas")
    return 0


@contextmanager
def running_fleet(
    settings: FleetSettings,
    listening: ServerAddress,
    address: str | None = None,
    build: Build = build_application,
) -> Iterator[None]:
    """Have a fleet that answers requests inside the block."""
    if address is None:
        _check_free(listening)
    options = _own_ray(settings) if address is None else {"address": address}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(log_to_driver=True, logging_level="ERROR", **options)
    try:
        settings = _with_resources(settings)
        if address is None:
            settings.check_fits(ray.cluster_resources())
        where = {"host": listening.host, "port": listening.port}
        serve.start(proxy_location="EveryNode", http_options=where)
        try:
            deploy(build(settings))
            yield
        finally:
            _drain(settings.drain_seconds)
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


def deploy(application: serve.Application) -> None:
    """Start the replicas, or replace those that run, and wait until they answer."""
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise EngineDead(f"the replicas did not start: {_cause(error)}") from error


def _drain(seconds: float) -> None:
    """Delete the application, and wait for replicas that finish their requests."""
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + seconds + _STOP_SECONDS
    while APPLICATION in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)


def _own_ray(settings: FleetSettings) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    return {
        "address": "local",  # whatever else runs on this machine
        "num_cpus": max(cores, settings.max_replicas),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }


def _with_resources(settings: FleetSettings) -> FleetSettings:
    """Divide what Ray has among the replicas, unless the user has said what each gets."""
    if settings.cpus or settings.gpus:
        return settings
    have = ray.cluster_resources()
    if have.get("GPU", 0):
        return replace(settings, gpus=float(settings.num_ranks))
    return replace(settings, cpus=max(1.0, have.get("CPU", 1) // settings.max_replicas))


def _check_free(listening: ServerAddress) -> None:
    """Raise ConfigError if the port is taken: Ray would say so only in a log."""
    host = listening.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, listening.port))
        except OSError as error:
            where = f"{host}:{listening.port}"
            reason = error.strerror or error
            raise ConfigError(f"cannot listen on {where}: {reason}; give another --port") from error


def _cause(error: RuntimeError) -> str:
    """Return the line of Ray's report that names the error in a replica, or else Ray's own."""
    found = serve.status().applications.get(APPLICATION)
    messages = [] if found is None else [one.message for one in found.deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    named = [line for line in lines if _ERROR.match(line)]
    return _ERROR.sub("", named[-1]) if named else " ".join(str(error).split())


def _summary(settings: FleetSettings, listening: ServerAddress) -> str:
    least, most = settings.min_replicas, settings.max_replicas
    count = str(least) if least == most else f"{least} to {most}"
    return (
        f"emo-serve: {count} replicas are ready at {listening.url}\n"
        f"  what each has   emo-serve cluster status --server {listening.url}\n"
        f"  pools           emo-serve pools list --server {listening.url}"
    )
