"""Clients that leave: how soon their leases are back, and how much is generated for nobody.

    streams    300 clients leave in the middle of a stream, all at once
    waiting    slots for two pools, both busy; 200 clients ask for a third, half of them as streams,
               and leave while it is waited for: it must not be loaded for them

Tokens for nobody are counted from just before the first client leaves, so they are an upper bound.

    python -m benchmarks.reliability.abort
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import aiohttp

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.reliability.client import COMPLETIONS, ask, read_event
from benchmarks.reliability.server import Server, server
from benchmarks.reliability.state import metric, pools, residency, until_idle

_BUSY, _WAITED = ("python", "math"), "english"
_EXPERTS_A_POOL = 8
_BUSY_CLIENTS = 16
_TOKENS = "vllm:generation_tokens_total"


def body_of(pool: str, index: int, tokens: int, stream: bool = True) -> dict[str, Any]:
    """Return a completion of so many tokens."""
    return {
        "model": pool,
        "prompt": f"def f{index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }


async def leave_streams(running: Server, clients: int) -> dict[str, Any]:
    """Let every client read one event, wait for the others, and close its connection."""
    reading = asyncio.Barrier(clients + 1)

    async def client(session: aiohttp.ClientSession, index: int) -> bool:
        body = body_of(_BUSY[index % 2], index, tokens=900)
        async with session.post(COMPLETIONS, json=body) as response:
            async for line in response.content:
                if read_event(line) is not None:
                    break
            await reading.wait()
            ended = response.content.at_eof()
            response.close()
            return not ended

    async with running.session() as session, running.observer() as observer:
        tasks = [asyncio.create_task(client(session, index)) for index in range(clients)]
        while reading.n_waiting < clients:
            await asyncio.sleep(0.01)
        before = await metric(observer, _TOKENS)
        await reading.wait()
        left = sum(await asyncio.gather(*tasks))
        start = time.monotonic()
        await until_idle(observer)
        seconds = time.monotonic() - start
        idle_tokens = await metric(observer, _TOKENS)
        await asyncio.sleep(2)
        return {
            "clients": clients,
            "left_in_the_middle": left,
            "leases_back_seconds": seconds,
            "tokens_for_nobody_at_most": await metric(observer, _TOKENS) - before,
            "tokens_after_leases_were_back": await metric(observer, _TOKENS) - idle_tokens,
            "after": await residency(observer),
        }


async def leave_waiting(running: Server, clients: int) -> dict[str, Any]:
    """Keep both resident pools busy; let clients of a third leave while it is waited for."""
    async with running.session() as session, running.observer() as observer:
        busy = [
            asyncio.create_task(ask(session, body_of(_BUSY[index % 2], index, tokens=900)))
            for index in range(_BUSY_CLIENTS)
        ]
        while (await pools(observer))["running_requests"] < _BUSY_CLIENTS:
            await asyncio.sleep(0.02)
        waiting = [
            asyncio.create_task(ask(session, body_of(_WAITED, index, 500, stream=index % 2 == 0)))
            for index in range(clients)
        ]
        most = 0
        deadline = time.monotonic() + 10
        while most < clients and time.monotonic() < deadline:
            most = max(most, (await pools(observer))["waiting_requests"])
            await asyncio.sleep(0.01)
        left = sum(task.cancel() for task in waiting)
        start = time.monotonic()
        while (await pools(observer))["waiting_requests"] and time.monotonic() - start < 60:
            await asyncio.sleep(0.01)
        seconds = time.monotonic() - start
        answers = await asyncio.gather(*busy)
        await until_idle(observer)
        await asyncio.sleep(1)
        return {
            "clients": clients,
            "waiting": most,
            "left_while_waiting": left,
            "none_waits_seconds": seconds,
            "busy_streams_finished": sum(answer.ending == "finished" for answer in answers),
            "loads_of_the_pool": await metric(
                observer, "emo_serve_pool_loads_total", pool=_WAITED, outcome="loaded"
            ),
            "tokens_for_nobody": await metric(
                observer, "emo_serve_generation_tokens_total", pool=_WAITED
            ),
            "after": await residency(observer),
        }


def main() -> None:
    """Run both parts, print their figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=300, help="clients of streams [300]")
    parser.add_argument("--waiting", type=int, default=200, help="clients that wait [200]")
    parser.add_argument("--port", type=int, help="of the server [a free one]")
    args = parser.parse_args()
    slots = ["--expert-slots", str(2 * _EXPERTS_A_POOL), "--default-pool", _BUSY[0]]
    parts = (
        ("streams", leave_streams, args.streams, ["--max-num-seqs", str(args.streams)]),
        ("waiting", leave_waiting, args.waiting, [*slots, "--preload", ",".join(_BUSY)]),
    )
    result = {}
    for name, leave, clients, flags in steps(parts, "parts"):
        with server(*flags, port=args.port) as running:
            result[name] = asyncio.run(leave(running, clients))
        say(f"{name} {json.dumps(result[name], indent=1)}")
    print(f"appended to {append_result('reliability_abort', vars(args), result)}")


if __name__ == "__main__":
    main()
