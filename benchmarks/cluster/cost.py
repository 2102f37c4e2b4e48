"""What Ray's proxy costs: processor seconds per request and per streamed chunk, by process.

One server of the shipped model, alone or as the only replica behind Ray's proxy, answers
completions of one token and then streams, one after another. What the processes take while nothing
is asked is measured first and subtracted. The engine's share is the same work in both cases, but
for its threads: alone it binds them to cores, and beside other replicas it does not.

    python -m benchmarks.cluster.cost --behind proxy
    python -m benchmarks.cluster.cost --behind nothing
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import psutil

from benchmarks.cluster.on_ray import FLAGS, by_role, cpu_seconds, memory, running
from benchmarks.harness.progress import say
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from emo_serve import demo

_POOL = sorted(demo.domains())[0]
_SECONDS = 120.0
_WARM_UP = 20

Roles = dict[str, list[psutil.Process]]


@contextmanager
def answering(behind: str) -> Iterator[tuple[str, Roles]]:
    """Have one server inside the block; yields its address and its processes by role."""
    if behind == "proxy":
        with running((1, 1)) as fleet:
            yield fleet.url, by_role()
        return
    command = [sys.executable, "-m", "emo_serve", "serve", *FLAGS]
    with ServerProcess(command, variables={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        front, *engine = server.processes()
        yield server.url, {"replica": [front], "engine": engine}


async def ask(url: str, count: int, tokens: int, *, stream: bool) -> int:
    """Ask for completions one after another; return how many chunks came, 0 without streams."""
    body = {"model": _POOL, "prompt": "the ", "max_tokens": tokens, "ignore_eos": True}
    chunks = 0
    async with httpx.AsyncClient(base_url=url, timeout=_SECONDS) as http:
        for _ in range(count):
            document = {**body, "stream": stream}
            async with http.stream("POST", "/v1/completions", json=document) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    chunks += line.startswith("data: {")
    return chunks


def spent(
    roles: Roles, idle: Mapping[str, float], work: Callable[[], int]
) -> tuple[dict[str, float], int]:
    """Do some work; return the processor seconds it took of each role, and what it returned."""
    before, start = cpu_seconds(roles), time.perf_counter()
    count = work()
    seconds = time.perf_counter() - start
    after = cpu_seconds(roles)
    return {role: after[role] - before[role] - idle[role] * seconds for role in roles}, count


def per(spent_seconds: Mapping[str, float], count: int) -> dict[str, float]:
    """Return milliseconds for each of `count` things."""
    return {role: round(1e3 * seconds / count, 3) for role, seconds in spent_seconds.items()}


def measure(url: str, roles: Roles, args: argparse.Namespace) -> dict[str, Any]:
    """Return the costs of one server."""

    def asked(count: int, tokens: int, *, stream: bool) -> Callable[[], int]:
        return lambda: asyncio.run(ask(url, count, tokens, stream=stream))

    asked(_WARM_UP, 4, stream=True)()
    before, start = cpu_seconds(roles), time.perf_counter()
    time.sleep(args.idle_seconds)
    seconds, after = time.perf_counter() - start, cpu_seconds(roles)
    idle = {role: (after[role] - before[role]) / seconds for role in roles}
    plain, _ = spent(roles, idle, asked(args.requests, 1, stream=False))
    streams, chunks = spent(roles, idle, asked(args.streams, args.tokens, stream=True))
    short, short_chunks = spent(roles, idle, asked(args.streams, 1, stream=True))
    more = {role: streams[role] - short[role] for role in roles}
    return {
        "idle_ms_per_second": per(idle, 1),
        "request_ms": per(plain, args.requests),
        "chunk_ms": per(more, chunks - short_chunks),
        "chunks": chunks,
        "memory": memory(roles),
    }


def rows_of(result: Mapping[str, Any]) -> Sequence[str]:
    """Return the lines of a table: one for each role."""
    return [
        f"| {role} | {result['request_ms'][role]:.2f} | {result['chunk_ms'][role]:.3f} |"
        f" {result['idle_ms_per_second'][role]:.1f} | {amount['rss_mib']} | {amount['pss_mib']} |"
        for role, amount in result["memory"].items()
    ]


def main() -> None:
    """Measure one case, print its figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--behind", choices=("proxy", "nothing"), default="proxy")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="per stream [128]")
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with answering(args.behind) as (url, roles):
        result = measure(url, roles, args)
    say("| process | CPU ms/request | CPU ms/chunk | idle, CPU ms/s | RSS, MiB | PSS, MiB |")
    say("|---|---|---|---|---|---|")
    for row in rows_of(result):
        say(row)
    say(f"appended to {append_result('cluster_cost', vars(args), result)}")


if __name__ == "__main__":
    main()
