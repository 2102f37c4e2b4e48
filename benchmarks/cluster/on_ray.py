"""A real fleet to measure: replicas of the shipped model on a Ray of this process's own."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from benchmarks.harness.progress import say
from benchmarks.harness.servers import free_port
from emo_serve.ray_cluster.settings import FleetSettings

__all__ = [
    "FLAGS",
    "ROUTERS",
    "Account",
    "RealFleet",
    "by_role",
    "cpu_seconds",
    "memory",
    "running",
]

FLAGS = ("--expert-slots", "16")
"""Slots for two of the ten pools that ship."""

ROUTERS: Mapping[str, str | None] = {
    "affinity": None,  # ours
    "round-robin": "benchmarks.cluster.ray_routers.RoundRobinRouter",
    "power-of-two": "benchmarks.cluster.ray_routers.PowerOfTwoRouter",
}
_SECONDS = 300.0
_LOADS = "emo_serve_pool_loads_total{"
_ROLES = {"ServeReplica": "replica", "ProxyActor": "proxy", "ServeController": "controller"}


@dataclass(frozen=True)
class Account:
    """What one replica has done so far."""

    hits: int
    misses: int
    loads: int

    def since(self, before: Account) -> Account:
        """Return what it has done since then."""
        return Account(
            self.hits - before.hits, self.misses - before.misses, self.loads - before.loads
        )


class RealFleet:
    """A fleet that answers at `url`; `settings` are those it was started with."""

    def __init__(self, settings: FleetSettings, url: str, build: Callable[..., Any]) -> None:
        self.settings, self.url, self.build = settings, url, build
        self.http = httpx.Client(base_url=url, timeout=_SECONDS)

    def replicas(self) -> list[str]:
        """Return the names of the replicas that take requests."""
        return sorted(self.http.get("/v1/pools").raise_for_status().json()["replicas"])

    def accounts(self) -> dict[str, Account]:
        """Return what each replica has done."""
        return {name: self._account(name) for name in self.replicas()}

    def _account(self, replica: str) -> Account:
        params = {"replica": replica}
        cards = self.http.get("/v1/pools", params=params).raise_for_status().json()["data"]
        text = self.http.get("/metrics", params=params).raise_for_status().text
        loads = [line for line in text.splitlines() if line.startswith(_LOADS)]
        return Account(
            sum(card["hits"] for card in cards),
            sum(card["misses"] for card in cards),
            int(sum(float(line.split()[-1]) for line in loads)),
        )

    def evict_all(self) -> None:
        """Leave nothing resident on any replica."""
        for card in self.http.get("/v1/pools").json()["data"]:
            if card["resident"]:
                path = f"/v1/pools/{card['name']}/evict"
                self.http.post(path, json={"drain": True}).raise_for_status()


@contextmanager
def running(
    replicas: tuple[int, int] = (2, 2),
    flags: Sequence[str] = FLAGS,
    *,
    router: str = "affinity",
    cpus: float = 0.0,
    drain_seconds: float = 30.0,
    **changed: Any,
) -> Iterator[RealFleet]:
    """Have a fleet inside the block; `changed` replaces options of its Serve deployment.

    Call it before Ray is imported. `router` is one of ROUTERS.
    """
    from emo_serve.ray_cluster.environment import prepare_environment

    prepare_environment(is_alone=True)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from emo_serve.ray_cluster.application import build_application
    from emo_serve.ray_cluster.on_machine import running_fleet
    from emo_serve.server.startup.address import ServerAddress

    if name := ROUTERS[router]:
        from ray.serve.config import RequestRouterConfig

        changed["request_router_config"] = RequestRouterConfig(request_router_class=name)
    listening = ServerAddress("127.0.0.1", free_port())
    where = ("--host", listening.host, "--port", str(listening.port))
    settings = FleetSettings((*flags, *where), *replicas, cpus=cpus, drain_seconds=drain_seconds)

    def build(wanted: FleetSettings) -> Any:
        return build_application(wanted, **changed)

    start = time.monotonic()
    with running_fleet(settings, listening, build=build):
        say(f"{replicas[0]} replicas after {time.monotonic() - start:.0f} s")
        fleet = RealFleet(settings, listening.url, build)
        with fleet.http:
            yield fleet


# -- processes --


def by_role(root: psutil.Process | None = None) -> dict[str, list[psutil.Process]]:
    """Return the processes below `root`, this one by default, by what they are for.

    Roles are proxy, controller, replica, engine (all below a replica) and ray (all others).
    """
    found: defaultdict[str, list[psutil.Process]] = defaultdict(list)
    below = (root or psutil.Process()).children(recursive=True)
    replicas = [one for one in below if _role(one) == "replica"]
    engines = {child for one in replicas for child in one.children(recursive=True)}
    for process in below:
        found["engine" if process in engines else _role(process)].append(process)
    return dict(found)


def _role(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return "ray"
    return next((role for word, role in _ROLES.items() if word in words), "ray")


def cpu_seconds(processes: Mapping[str, Sequence[psutil.Process]]) -> dict[str, float]:
    """Return the processor time of each role so far."""
    return {
        role: sum(sum(process.cpu_times()[:2]) for process in some if process.is_running())
        for role, some in processes.items()
    }


def memory(processes: Mapping[str, Sequence[psutil.Process]]) -> dict[str, dict[str, float]]:
    """Return each role's processes and MiB: resident, and with shared pages divided (PSS)."""
    return {
        role: {
            "processes": len(some),
            "rss_mib": round(sum(one.memory_info().rss for one in some) / 2**20),
            "pss_mib": round(sum(one.memory_full_info().pss for one in some) / 2**20),
        }
        for role, some in processes.items()
    }
