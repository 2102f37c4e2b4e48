"""One server of the shipped model that everything here abuses, and how long it may take.

EMO_ABUSE_MINUTES makes the tests longer than the four minutes of CI. EMO_ABUSE_URL names a server
that runs already, for example plain vLLM with the same model; what needs the server's own process
is skipped then. docs/development.md has the commands.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import emo_serve.demo
from tests.abuse.watching import HealthWatch, memory_of, watched
from tests.support.server_process import RunningServer, serve

MINUTES = float(os.environ.get("EMO_ABUSE_MINUTES", "4"))
URL = os.environ.get("EMO_ABUSE_URL")

FLAGS = (
    # room for the default pool and one more
    *("--expert-slots", "17", "--preload", "python,math", "--default-pool", "python"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--kv-cache-memory-bytes", str(128 * 2**20), "--enforce-eager"),
)


@dataclass(frozen=True)
class Abused:
    """The server; what OpenAPI says of it; its memory when it had answered a few requests."""

    url: str
    document: dict[str, Any]
    model: str
    health: HealthWatch
    deadline: float
    process: RunningServer | None = None
    memory: dict[str, int] | None = None

    @property
    def seconds_left(self) -> float:
        """Return the time until the tests should end; the start does not count."""
        return self.deadline - time.monotonic()


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Abused]:
    """The server, with its own copy of the pools; started when a module begins to use it."""
    if URL is not None:
        with watched(URL) as health:
            yield _described(URL, health)
        return
    directory = tmp_path_factory.mktemp("abused")
    shipped = Path(emo_serve.demo.__file__).parent / "pools" / "emo-demo"
    pools = shutil.copytree(shipped, directory / "pools")
    with (
        serve(directory, "--pools", str(pools), *FLAGS) as server,
        watched(server.url) as health,
    ):
        yield _described(server.url, health, server)


def _described(url: str, health: HealthWatch, process: RunningServer | None = None) -> Abused:
    with httpx.Client(base_url=url, timeout=120.0) as http:
        document = http.get("/openapi.json").json()
        model = http.get("/v1/models").json()["data"][0]["id"]
        for _ in range(20):
            body = {"model": model, "prompt": "hi", "max_tokens": 2, "logprobs": 1}
            http.post("/v1/completions", json=body).raise_for_status()
    memory = None if process is None else memory_of(process.process.pid)
    return Abused(url, document, model, health, time.monotonic() + MINUTES * 60, process, memory)


@pytest.fixture
async def http(abused: Abused) -> AsyncIterator[httpx.AsyncClient]:
    """A client that opens a connection per request, so that no request can harm another's."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=abused.url, limits=limits, timeout=None) as client:
        yield client


@pytest.fixture
async def unpinned(abused: Abused, http: httpx.AsyncClient) -> None:
    """Before the test, allow every pool to be evicted: others would be refused for lack of room."""
    if abused.process is not None:
        for card in (await http.get("/v1/pools")).json()["data"]:
            if card["pinned"]:
                (await http.post(f"/v1/pools/{card['name']}/unpin")).raise_for_status()
