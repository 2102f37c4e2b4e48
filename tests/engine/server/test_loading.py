"""Loading beside traffic on a real server: which requests wait, how long, and refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.server_process import (
    RawRequest,
    RunningServer,
    error_of,
    serve,
    stopped_engine,
    wait_for,
)

pytestmark = pytest.mark.vllm

DEADLINE_SECONDS = 6.0


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, golden_pools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Room for two of math, code and law at once, a short deadline and a short waiting queue."""
    with serve(
        tmp_path_factory.mktemp("loading"),
        str(golden_checkpoint),
        *("--pools", str(golden_pools), "--expert-slots", "24", "--default-pool", "math"),
        *("--preload", "math,code", "--load-deadline", str(DEADLINE_SECONDS)),
        *("--max-waiting", "8", "--served-model-name", "emo", "--dtype", "float32"),
        *("--max-model-len", "512", "--enforce-eager"),
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def card(http: httpx.Client, pool: str) -> dict[str, Any]:
    answer: dict[str, Any] = http.get(f"/v1/pools/{pool}").json()
    return answer


def test_only_the_request_whose_pool_must_go_first_waits(
    server: RunningServer, http: httpx.Client
) -> None:
    """Law needs a slot of math's or code's, both are busy: it waits, and code answers meanwhile."""
    with (
        RawRequest(server, model="math", prompt=["a"] * 4) as old,
        RawRequest(server, model="code", prompt=["a"] * 4) as recent,
    ):
        old.read_events(1)
        recent.read_events(1)
        with RawRequest(server, model="law", prompt="a", max_tokens=4) as request:
            wait_for(lambda: card(http, "law")["waiting_requests"] == 1)
            closing = [p for p in ("math", "code") if card(http, p)["state"] == "closing"]
            assert closing == ["math"]  # least recently asked for
            with server.client() as client:
                client.completions.create(model="code", prompt="a", max_tokens=2)
            old.read_to_end()  # nothing that runs is interrupted
            request.read_to_end()
        assert b"200 OK" in request.received
        assert request.received.count(b'"finish_reason":"length"') == 1
        recent.read_to_end()
    assert old.received.count(b'"finish_reason":"length"') == 4
    assert card(http, "law")["resident"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_wait_past_the_deadline_is_a_503_even_for_a_stream(
    server: RunningServer, http: httpx.Client, stream: bool
) -> None:
    with server.client() as client:
        for pool in ("math", "code"):
            client.completions.create(model=pool, prompt="a", max_tokens=1)
        with (
            stopped_engine(server),
            RawRequest(server, model="math", prompt="a"),
            RawRequest(server, model="code", prompt="a"),
        ):
            wait_for(lambda: all(card(http, p)["running_requests"] == 1 for p in ("math", "code")))
            start = time.monotonic()
            with pytest.raises(openai.InternalServerError) as refusal:
                client.completions.create(model="law", prompt="a", max_tokens=1, stream=stream)
            waited = time.monotonic() - start
        assert refusal.value.status_code == 503
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        assert "was not loaded within 6 s" in error_of(refusal.value)["message"]
        assert waited >= DEADLINE_SECONDS
        wait_for(lambda: all(card(http, p)["state"] == "resident" for p in ("math", "code")))
        client.completions.create(model="math", prompt="a", max_tokens=1)  # open again


def test_the_line_is_bounded(server: RunningServer, http: httpx.Client) -> None:
    with server.client() as client:
        for pool in ("math", "code"):
            client.completions.create(model=pool, prompt="a", max_tokens=1)
        with (
            stopped_engine(server),
            RawRequest(server, model="math", prompt="a"),
            RawRequest(server, model="code", prompt="a"),
            RawRequest(server, model="law", prompt=["a"] * 8),
            pytest.raises(openai.InternalServerError) as refusal,
        ):
            wait_for(lambda: card(http, "law")["waiting_requests"] == 8)
            client.completions.create(model="law", prompt="a", max_tokens=1)
    assert "8 requests wait for loads already" in error_of(refusal.value)["message"]
    wait_for(lambda: http.get("/v1/pools").json()["waiting_requests"] == 0)  # all have left


async def test_no_request_starves_beside_endless_load(server: RunningServer) -> None:
    """Two pools never idle, room for two: a third is served within one request and a load."""
    async with server.async_client() as client:
        is_over = asyncio.Event()

        async def endless(pool: str) -> int:
            served = 0
            while not is_over.is_set():
                await client.completions.create(model=pool, prompt="a", max_tokens=60)
                served += 1
            return served

        async def timed(pool: str) -> float:
            start = time.monotonic()
            await client.completions.create(model=pool, prompt="a", max_tokens=60)
            return time.monotonic() - start

        # six and one: fewer than may wait at once
        load = [asyncio.create_task(endless(pool)) for pool in ("math", "code") * 3]
        alone = [await timed("math") for _ in range(6)]
        waits = [await timed("law") for _ in range(6)]
        is_over.set()
        served = await asyncio.gather(*load)
    print(f"\na request under load {max(alone):.2f} s; of a third pool {max(waits):.2f} s")
    assert all(served)
    # Its own run, the longest run of the pool that must go, a load; in turn with math and code.
    assert max(waits) < DEADLINE_SECONDS


async def test_a_client_that_leaves_while_its_pool_loads_leaves_nothing_behind(
    server: RunningServer,
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for attempt in range(30):
            pool = ("law", "math", "code", "tiny")[attempt % 4]
            body = {"model": pool, "prompt": "a", "max_tokens": 200, "stream": attempt % 2 == 0}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.004 * (attempt % 7))
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        for _ in range(200):
            listed = (await http.get("/v1/pools")).json()
            if not any(p["running_requests"] or p["waiting_requests"] for p in listed["data"]):
                break
            await asyncio.sleep(0.05)
        assert listed["waiting_requests"] == 0
        assert all(p["running_requests"] == 0 for p in listed["data"])
        answer = await http.post("/v1/completions", json={"model": "law", "prompt": "a"})
        assert answer.status_code == 200
