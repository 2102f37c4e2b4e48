"""What clients of two real replicas see of overload, and how soon a replica sees that they left.

leave      clients leave in the middle of a stream, one after another, beside eight streams that
           go on; the replica's request log tells when the engine was rid of each
overload   more completions at once than the replicas take: who is answered, who is refused and
           how; the same of one server with no proxy in front of it

python -m benchmarks.cluster.faults --of fleet
python -m benchmarks.cluster.faults --of server      # overload only
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.cluster.on_ray import FLAGS, running
from benchmarks.harness.progress import say
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.reliability.client import COMPLETIONS, Answer, ask, endings
from benchmarks.reliability.summary import percentiles
from emo_serve import demo

_POOLS = sorted(demo.domains())[:2]
_SMALL = ("--max-num-seqs", "8", "--max-queued", "8")
_SECONDS = 200.0
_BACKGROUND = 8


def _session(url: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


def _body(number: int, tokens: int, *, stream: bool) -> dict[str, Any]:
    pool = _POOLS[number % len(_POOLS)]
    document = {"model": pool, "prompt": "the ", "max_tokens": tokens, "ignore_eos": True}
    return {**document, "stream": stream}


# -- overload --


async def flood(url: str, requests: int) -> dict[str, Any]:
    """Send all requests at once, every second one as a stream."""
    async with _session(url) as session:
        bodies = (_body(number, 32, stream=number % 2 == 0) for number in range(requests))
        answers = await asyncio.gather(*(ask(session, body) for body in bodies))
    refused = [one for one in answers if one.status == 503]
    return {
        "answers": endings(answers),
        "with_retry_after": sum(one.retry_after is not None for one in refused),
        "in_the_routes_shape": sum(_is_error(one) for one in refused),
        "refused_seconds": percentiles([one.seconds for one in refused]),
    }


def _is_error(answer: Answer) -> bool:
    try:
        return "message" in json.loads(answer.message)["error"]
    except (ValueError, KeyError, TypeError):
        return False


# -- clients that leave --


async def leave(url: str, clients: int) -> list[float]:
    """Have clients leave one after another; return when, in Unix time."""
    async with _session(url) as session:
        others = [
            asyncio.create_task(_keep_streaming(session, number)) for number in range(_BACKGROUND)
        ]
        await asyncio.sleep(2.0)
        left = [await _one_leaves(session, number) for number in range(clients)]
        await asyncio.sleep(2.0)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return left


async def _keep_streaming(session: aiohttp.ClientSession, number: int) -> None:
    while True:
        await ask(session, _body(number, 200, stream=True))


async def _one_leaves(session: aiohttp.ClientSession, number: int) -> float:
    response = await session.post(COMPLETIONS, json=_body(number, 900, stream=True))
    for _ in range(6):
        await response.content.readline()
    response.close()
    left = time.time()
    await asyncio.sleep(0.4)  # so that leavers and lines of the log can be matched
    return left


def ended_at(directory: Path) -> list[float]:
    """Return when replicas were rid of requests whose clients had left, in Unix time."""
    lines = [line for file in directory.glob("*.jsonl") for line in file.read_text().splitlines()]
    records = [one for one in map(json.loads, lines) if one["outcome"] == "aborted"]
    fields = ("at_seconds", "wait_seconds", "service_seconds")
    return sorted(sum(record[name] for name in fields) for record in records)


def delays(left: list[float], ended: list[float]) -> list[float | None]:
    """Return for each leaver how long the first end after it took; None if there is none."""
    todo, found = list(ended), []
    for at in left:
        after = [one for one in todo if one >= at]
        found.append(after[0] - at if after else None)
        if after:
            todo.remove(after[0])
    return found


def of_fleet(requests: int, clients: int) -> dict[str, Any]:
    """Have clients leave two replicas, then flood them."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = ("--request-log", str(directory / "log.jsonl"))
        with running(flags=(*FLAGS, *_SMALL, *log)) as fleet:
            left = asyncio.run(leave(fleet.url, clients))
            ended = ended_at(directory)
            flooded = asyncio.run(flood(fleet.url, requests))
    found = [one for one in delays(left, ended) if one is not None]
    leaving = {"left": len(left), "ended": len(found), "seconds": percentiles(found)}
    return {"leave": leaving, "overload": flooded}


def of_server(requests: int) -> dict[str, Any]:
    """Flood one server with as many requests as a replica gets on average."""
    command = [sys.executable, "-m", "emo_serve", "serve", *FLAGS, *_SMALL]
    with ServerProcess(command, variables={"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
        return {"overload": asyncio.run(flood(server.url, requests // 2))}


def main() -> None:
    """Measure one of the two, print its figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--of", choices=("fleet", "server"), default="fleet")
    parser.add_argument("--requests", type=int, default=200, help="of the overload [200]")
    parser.add_argument("--clients", type=int, default=100, help="that leave [100]")
    args = parser.parse_args()
    if args.of == "fleet":
        result = of_fleet(args.requests, args.clients)
    else:
        result = of_server(args.requests)
    say(json.dumps(result, indent=1))
    say(f"appended to {append_result('cluster_faults', vars(args), result)}")


if __name__ == "__main__":
    main()
