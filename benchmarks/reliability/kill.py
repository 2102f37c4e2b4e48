"""kill -9 of each process of a server: who notices, what is left, whether a restart works.

Front end, engine and worker are killed in turn, while 20 streams and 5 plain requests run; after
each, a server starts again at the same place: the same port, or the same Unix socket (`--uds`).
Measured from the kill: when the other processes were gone, how the requests ended, what `/ready`
said until nobody answered, and what was left after 5 s.

    python -m benchmarks.reliability.kill
    python -m benchmarks.reliability.kill --uds
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import free_port
from benchmarks.reliability.client import ask, endings
from benchmarks.reliability.server import Server, is_alive, shared_memory_of

_LATER_SECONDS = 5.0
_REQUESTS, _STREAMS = 25, 20


async def kill(running: Server, role: str) -> dict[str, Any]:
    """Kill the processes of a role under load; return what happened within 5 s."""
    processes = running.processes()
    segments = shared_memory_of(processes)
    victims = running.by_role()[role]
    async with running.session(seconds=60) as session:
        requests = [asyncio.create_task(ask(session, _body(i))) for i in range(_REQUESTS)]
        await asyncio.sleep(2.5)
        start = time.monotonic()
        for victim in victims:
            victim.kill()
        ready = asyncio.create_task(_ready_until_gone(running, start))
        gone = None
        while gone is None and time.monotonic() - start < _LATER_SECONDS:
            running.process.poll()
            if not any(map(is_alive, processes)):
                gone = time.monotonic() - start
            await asyncio.sleep(0.02)
        await asyncio.sleep(max(0.0, start + _LATER_SECONDS - time.monotonic()))
        left = {
            "processes": sum(map(is_alive, processes)),
            "shared_memory": sum(map(os.path.exists, segments)),
            "temporary_files": len(running.temporary_files()),
        }
        answers = await asyncio.gather(*requests)
    return {
        "processes_before": len(processes),
        "shared_memory_before": len(segments),
        "all_gone_seconds": gone,
        "left_after_5_s": left,
        "exit_status": running.process.poll(),
        "ready": await ready,
        "streams": endings(answers[:_STREAMS]),
        "plain": endings(answers[_STREAMS:]),
        "requests_ended_seconds": max(answer.seconds for answer in answers) - 2.5,
    }


def _body(index: int) -> dict[str, Any]:
    return {
        "model": ("python", "math")[index % 2],
        "prompt": f"def f{index}",
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": index < _STREAMS,
    }


async def _ready_until_gone(running: Server, start: float) -> list[list[Any]]:
    """Return each change of what `/ready` answers, with its time, until nobody listens."""
    seen: list[list[Any]] = []
    async with running.observer() as session:
        while time.monotonic() - start < 30 and (not seen or seen[-1][1] != "nobody"):
            try:
                async with session.get("/ready") as response:
                    state: Any = response.status
            except aiohttp.ClientConnectorError:
                state = "nobody"
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                state = type(error).__name__
            if not seen or seen[-1][1] != state:
                seen.append([round(time.monotonic() - start, 2), state])
            await asyncio.sleep(0.02)
    return seen


async def serves(running: Server) -> bool:
    """Tell whether a completion is answered."""
    async with running.session() as session:
        return (await ask(session, {"model": "python", "prompt": "a"})).ending == "finished"


def run_cases(directory: Path, place: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Kill one role after another; the server that starts after each kill is the next victim."""
    results: dict[str, dict[str, Any]] = {}
    before: dict[str, Any] | None = None
    for role in steps(("front end", "engine", "worker", None), "servers"):
        with Server(directory, **place) as running:
            if before is not None:
                before["restart"] = {
                    "seconds": running.start_seconds,
                    "serves": asyncio.run(serves(running)),
                }
                say(json.dumps(before, indent=1))
            if role is None:
                running.stop()
            else:
                before = {"killed": role, **asyncio.run(kill(running, role))}
                results[role] = before
    return results


def main() -> None:
    """Run every case, print its figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--port", type=int, help="of the server [a free one]")
    parser.add_argument("--uds", action="store_true", help="listen on a Unix socket instead")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="emo-"))  # short: a socket's path has 107 characters
    place: dict[str, Any] = {"port": args.port or free_port()}
    if args.uds:
        place["socket_path"] = directory / "socket"
    try:
        result = run_cases(directory, place)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"appended to {append_result('reliability_kill', vars(args), result)}")


if __name__ == "__main__":
    main()
