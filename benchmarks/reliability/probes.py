"""Requests sent over and over from a process of their own.

A client with thousands of connections is slow itself; what a probe measures must not be its delay.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.reliability.server import Server, client_session

__all__ = ["Probe", "ProbeSample", "Probes"]

_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Probe:
    """A request to send, one after another: a GET, or a POST of `body`."""

    path: str
    body: Mapping[str, Any] | None = None
    pause_seconds: float = 0.2


@dataclass(frozen=True)
class ProbeSample:
    """One probe: when it was sent (time.monotonic), how long it took, and its status, if any."""

    sent: float
    seconds: float
    status: int | None


class Probes:
    """Send probes inside the `with` block; then `samples` has those of each."""

    def __init__(self, server: Server, probes: Mapping[str, Probe]) -> None:
        self.samples: dict[str, list[ProbeSample]] = {}
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, server.url, server.socket_path, dict(probes))
        self._process = context.Process(target=_run, args=arguments, daemon=True)

    def __enter__(self) -> Probes:
        self._process.start()
        self._connection.recv()  # it has begun
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send("stop")
        if self._connection.poll(_TIMEOUT_SECONDS + 10):
            self.samples = self._connection.recv()
        self._process.join(5)
        self._process.kill()


def _run(connection: Connection, url: str, socket: Path | None, probes: dict[str, Probe]) -> None:
    connection.send("begun")
    connection.send(asyncio.run(_probe(connection, url, socket, probes)))


async def _probe(
    connection: Connection, url: str, socket: Path | None, probes: dict[str, Probe]
) -> dict[str, list[ProbeSample]]:
    samples: dict[str, list[ProbeSample]] = {name: [] for name in probes}

    async def repeat(name: str, probe: Probe) -> None:
        while not connection.poll():
            samples[name].append(await _send(session, probe))
            await asyncio.sleep(probe.pause_seconds)

    async with client_session(url, socket, _TIMEOUT_SECONDS) as session:
        await asyncio.gather(*(repeat(name, probe) for name, probe in probes.items()))
    return samples


async def _send(session: aiohttp.ClientSession, probe: Probe) -> ProbeSample:
    sent, status = time.monotonic(), None
    method = "GET" if probe.body is None else "POST"
    try:
        async with session.request(method, probe.path, json=probe.body) as response:
            await response.read()
            status = response.status
    except (TimeoutError, aiohttp.ClientError, OSError):
        pass
    return ProbeSample(sent, time.monotonic() - sent, status)
