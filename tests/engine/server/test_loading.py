"""Loading beside traffic on a real server: which requests wait, how long, and refusals."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from tests.engine.server.conftest import MAX_WAITING, hold_only
from tests.support.progress import wait_for
from tests.support.server_process import (
    RawRequest,
    RunningServer,
    error_of,
    stopped_engine,
)

pytestmark = [pytest.mark.vllm, pytest.mark.server("tight")]


@pytest.fixture(autouse=True)
def two_pools(http: httpx.Client) -> None:
    """Math and code are resident, and there is no room for law beside both."""
    hold_only(http, "math", "code")


def card(http: httpx.Client, pool: str) -> dict[str, Any]:
    answer: dict[str, Any] = http.get(f"/v1/pools/{pool}").json()
    return answer


def test_only_the_request_whose_pool_must_go_first_waits(
    server: RunningServer, http: httpx.Client
) -> None:
    """Law needs a slot of math's or code's, both are busy: it waits, and code answers meanwhile."""
    with server.client() as client, ExitStack() as stack:
        with stopped_engine(server):
            counts = {"math": 4, "code": 40}
            old, recent = (
                stack.enter_context(
                    RawRequest(server, model=pool, prompt=["a"] * count, max_tokens=60)
                )
                for pool, count in counts.items()
            )
            wait_for(lambda: {p: card(http, p)["running_requests"] for p in counts} == counts)
            request = stack.enter_context(RawRequest(server, model="law", prompt="a", max_tokens=4))
            wait_for(lambda: card(http, "law")["waiting_requests"] == 1)
            closing = [pool for pool in counts if card(http, pool)["state"] == "closing"]
            assert closing == ["math"]  # less often asked for
        client.completions.create(model="code", prompt="a", max_tokens=2)
        old.read_to_end()  # nothing that runs is interrupted
        request.read_to_end()
        assert b"200 OK" in request.received
        assert request.received.count(b'"finish_reason":"length"') == 1
        recent.read_to_end()
    assert old.received.count(b'"finish_reason":"length"') == 4
    assert card(http, "law")["resident"]


def test_the_line_is_bounded(server: RunningServer, http: httpx.Client) -> None:
    with (
        server.client() as client,
        stopped_engine(server),
        RawRequest(server, model="math", prompt="a"),
        RawRequest(server, model="code", prompt="a"),
        RawRequest(server, model="law", prompt=["a"] * MAX_WAITING),
        pytest.raises(openai.InternalServerError) as refusal,
    ):
        wait_for(lambda: card(http, "law")["waiting_requests"] == MAX_WAITING)
        client.completions.create(model="law", prompt="a", max_tokens=1)
    assert f"{MAX_WAITING} requests wait for loads already" in error_of(refusal.value)["message"]
    wait_for(lambda: http.get("/v1/pools").json()["waiting_requests"] == 0)  # all have left


async def test_no_request_starves_beside_endless_load(server: RunningServer) -> None:
    """Two pools never idle, room for two: a third is served within one request and a load.

    Measured in requests, which a slow machine slows as much: what the others are served meanwhile.
    """
    async with server.async_client() as client:
        is_over, served = asyncio.Event(), Counter[str]()

        async def ask(pool: str) -> None:
            await client.completions.create(model=pool, prompt="a", max_tokens=60)
            served[pool] += 1

        async def endless(pool: str) -> None:
            while not is_over.is_set():
                await ask(pool)

        async def served_beside(pool: str) -> int:
            before = served.total()
            await ask(pool)
            return served.total() - before - 1

        # six and one: fewer than may wait at once
        load = [asyncio.create_task(endless(pool)) for pool in ("math", "code") * 3]
        alone = [await served_beside("math") for _ in range(6)]
        waits = [await served_beside("law") for _ in range(6)]
        is_over.set()
        await asyncio.gather(*load)
    print(f"\nbeside a request {max(alone)} others; beside one of a third pool {max(waits)}")
    assert min(served[pool] for pool in ("math", "code", "law")) >= 6
    # Its own run, the longest run of the pool that must go, a load; in turn with math and code.
    assert max(waits) <= 4 * len(load)


async def test_a_client_that_leaves_while_its_pool_loads_leaves_nothing_behind(
    server: RunningServer,
) -> None:
    async with server.async_http() as http:
        for attempt in range(30):
            pool = ("law", "math", "code", "tiny")[attempt % 4]
            body = {"model": pool, "prompt": "a", "max_tokens": 200, "stream": attempt % 2 == 0}
            request = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.004 * (attempt % 7))
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        while True:
            listed = (await http.get("/v1/pools")).json()
            if not any(p["running_requests"] or p["waiting_requests"] for p in listed["data"]):
                break
            await asyncio.sleep(0.05)
        assert listed["waiting_requests"] == 0
        answer = await http.post("/v1/completions", json={"model": "law", "prompt": "a"})
        assert answer.status_code == 200
