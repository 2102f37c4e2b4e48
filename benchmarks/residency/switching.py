"""What switching pools costs a user: more pools than fit, time to first token, bytes, memory.

One emo-serve on the shipped model, ten pools and slots for three. Three parts:

    ttft        one client asks for pools at random, first alone, then beside four streams of a
                pinned pool; time to first token of hits and of misses, as the server's request log
                tells them apart, and the bytes that loads copied against the bytes of the pools
    starvation  slots for two pools, which eight clients keep busy all the time; a third is asked
                for now and then: its worst wait, against the longest request of the two
    memory      slots in use and the processes' memory, before any pool was loaded and after
                hundreds of loads and the eviction of everything

    python -m benchmarks.residency.switching
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.harness.streams import beside, stream_completion
from emo_serve import demo

_EXPERTS_A_POOL = 8  # of the shipped pools, a layer
_PROMPT_CHARACTERS = 200
_TOKENS = 32


def start(slots: int, log: Path, *flags: str) -> ServerProcess:
    """Return a server of the shipped model with no pool loaded."""
    command = [sys.executable, "-m", "emo_serve", "serve", "--preload", ""]
    command += ["--expert-slots", str(slots), "--request-log", str(log), "--max-model-len", "1024"]
    return ServerProcess([*command, *flags])


async def first_token_seconds(http: httpx.AsyncClient, pool: str, tokens: int = _TOKENS) -> float:
    """Stream one completion to its end and return its time to first token."""
    texts = demo.heldout(pool)
    prompt = random.choice(texts)[:_PROMPT_CHARACTERS]
    body = {"model": pool, "prompt": prompt, "max_tokens": tokens}
    return (await stream_completion(http, body))[0]


async def endless(http: httpx.AsyncClient, pool: str, tokens: int) -> None:
    """Keep one stream of a pool going."""
    while True:
        await first_token_seconds(http, pool, tokens)


async def metric(http: httpx.AsyncClient, name: str) -> float:
    """Return the sum of a metric over its labels."""
    text = (await http.get("/metrics")).text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return sum(float(value) for found, _, value in lines if found.partition("{")[0] == name)


# -- time to first token --


async def ttft_part(server: ServerProcess, log: Path, requests: int) -> dict[str, Any]:
    """Measure hits and misses, alone and beside four streams."""
    pools = demo.domains()
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
        await ask_in_turn(http, log, pools, 20, background=None)  # warms up
        copied = -await metric(http, "emo_serve_pool_load_bytes_total")
        loads = -await metric(http, "emo_serve_pool_loads_total")
        result: dict[str, Any] = {"alone": await ask_in_turn(http, log, pools, requests, None)}
        copied += await metric(http, "emo_serve_pool_load_bytes_total")
        loads += await metric(http, "emo_serve_pool_loads_total")
        listed = (await http.get("/v1/pools")).json()["data"]
        result["bytes"] = {
            "loads": loads,
            "copied_a_load": copied / loads,
            "a_whole_pool": statistics.mean(p["bytes"] for p in listed if p["name"] != "base"),
        }
        result["beside_4_streams"] = await ask_beside(http, log, pools, requests)
    return result


async def ask_beside(
    http: httpx.AsyncClient, log: Path, pools: Sequence[str], requests: int
) -> dict[str, Any]:
    """Do the same while four streams of a pinned pool run."""
    pinned, others = pools[0], pools[1:]
    (await http.post(f"/v1/pools/{pinned}/pin")).raise_for_status()
    try:
        async with beside(endless(http, pinned, 400) for _ in range(4)):
            return await ask_in_turn(http, log, others, requests, background=pinned)
    finally:
        (await http.post(f"/v1/pools/{pinned}/unpin")).raise_for_status()


async def ask_in_turn(
    http: httpx.AsyncClient,
    log: Path,
    pools: Sequence[str],
    requests: int,
    background: str | None,
) -> dict[str, Any]:
    """Ask one pool after another and return the times of hits and of misses."""
    skipped = len(foreground(log, background))
    chance = random.Random(requests)
    wanted = steps(range(requests), "requests")
    seconds = [await first_token_seconds(http, chance.choice(pools)) for _ in wanted]
    await asyncio.sleep(0.2)  # the last line is written when the stream has ended
    lines = foreground(log, background)[skipped:]
    assert len(lines) == requests, (len(lines), requests)
    pairs = list(zip(lines, seconds, strict=True))
    return {
        kind: summary([s for line, s in pairs if line["is_hit"] is is_hit])
        for kind, is_hit in (("hit", True), ("miss", False))
    }


def foreground(log: Path, background: str | None) -> list[dict[str, Any]]:
    """Return the lines of the request log without those of the background."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["pool"] != background]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return count, median and 99th percentile, in milliseconds."""
    ranked = sorted(seconds)
    p99 = ranked[min(len(ranked) - 1, round(0.99 * len(ranked)))]
    return {"count": len(ranked), "p50_ms": 1e3 * statistics.median(ranked), "p99_ms": 1e3 * p99}


# -- starvation --


async def starvation_part(server: ServerProcess, requests: int) -> dict[str, float]:
    """Keep two pools busy and ask for a third: the wait, and the longest request of the two."""
    busy, third = demo.domains()[:2], demo.domains()[2]
    longest = 0.0

    async def client(http: httpx.AsyncClient, pool: str) -> None:
        nonlocal longest
        while True:
            start = time.perf_counter()
            first = await first_token_seconds(http, pool, 200)
            longest = max(longest, time.perf_counter() - start - first)

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http,
        beside(client(http, pool) for pool in busy * 4),
    ):
        await asyncio.sleep(3)
        waits = []
        for _ in steps(range(requests), "requests"):
            waits.append(await first_token_seconds(http, third))
            await asyncio.sleep(0.5)
    return {
        "requests": requests,
        "wait_p50_s": statistics.median(waits),
        "wait_max_s": max(waits),
        "longest_request_of_the_busy_pools_s": longest,
    }


# -- memory --


async def memory_part(server: ServerProcess, loads: int) -> dict[str, Any]:
    """Load pools in turn, evict everything, and compare with the start."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
        for pool in demo.domains():  # what is allocated once: staging, open files
            (await http.post(f"/v1/pools/{pool}/load")).raise_for_status()
        await evict_everything(http)
        before = await state(http, server)
        for number in steps(range(loads), "loads"):
            pool = demo.domains()[number % len(demo.domains())]
            (await http.post(f"/v1/pools/{pool}/load")).raise_for_status()
        loaded = await state(http, server)
        await evict_everything(http)
        after = await state(http, server)
    return {"before": before, "loaded": loaded, "after": after, "loads": loads}


async def evict_everything(http: httpx.AsyncClient) -> None:
    """Evict every pool, unions included."""
    for pool in (await http.get("/v1/pools")).json()["data"]:
        answer = await http.post(f"/v1/pools/{pool['name']}/evict", json={"drain": True})
        answer.raise_for_status()


async def state(http: httpx.AsyncClient, server: ServerProcess) -> dict[str, int]:
    """Return slots in use and the processes' memory."""
    slots = (await http.get("/v1/pools")).json()["slots"]
    return {"slots_used": slots["used"], "resident_bytes": server.resident_bytes()}


def main() -> None:
    """Run the parts, print what they found, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=300, help="of each half of ttft [300]")
    parser.add_argument("--thirds", type=int, default=20, help="requests for the third pool [20]")
    parser.add_argument("--loads", type=int, default=300, help="loads of the memory part [300]")
    parser.add_argument("--host-expert-memory", default=None, help="as emo-serve's flag [none]")
    args = parser.parse_args()
    tier = ["--host-expert-memory", args.host_expert_memory] if args.host_expert_memory else []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, suppress(KeyboardInterrupt):
        log = Path(directory) / "requests.jsonl"
        with start(3 * _EXPERTS_A_POOL, log, *tier) as server:
            result["ttft"] = asyncio.run(ttft_part(server, log, args.requests))
            result["memory"] = asyncio.run(memory_part(server, args.loads))
        with start(2 * _EXPERTS_A_POOL, log, *tier) as server:
            result["starvation"] = asyncio.run(starvation_part(server, args.thirds))
    print(json.dumps(result, indent=1))
    print(f"appended to {append_result('switching', vars(args), result)}")


if __name__ == "__main__":
    main()
