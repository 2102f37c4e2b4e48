"""How a server stops: SIGTERM while 200 streams run, within and beyond --drain-timeout.

    within    every stream can end within the drain timeout
    beyond    no stream can: what each client sees, and how long after the timeout the process ends
    second    a second SIGTERM one second after the first
    idle      nothing runs

For each: how the streams ended, when `/ready` turned to 503, what a new request got, the exit
status, seconds, and what was left.

    python -m benchmarks.reliability.drain
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.reliability.client import Answer, ask, endings
from benchmarks.reliability.server import Server, is_alive, server, shared_memory_of
from benchmarks.reliability.state import pools

_POOLS = ("python", "math")
_END_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """Streams of `tokens` tokens, the drain timeout, and when a second signal comes, if any."""

    streams: int
    tokens: int
    drain_seconds: int
    second_signal_after: float | None = None


def cases(streams: int) -> dict[str, Case]:
    """Return the cases by name."""
    return {
        "within": Case(streams, tokens=100, drain_seconds=60),
        "beyond": Case(streams, tokens=900, drain_seconds=3),
        "second": Case(streams, tokens=900, drain_seconds=60, second_signal_after=1.0),
        "idle": Case(0, tokens=0, drain_seconds=60),
    }


async def stop(running: Server, case: Case) -> dict[str, Any]:
    """Start the streams, signal, and watch until the process has ended."""
    async with running.session(seconds=_END_SECONDS) as session, running.observer() as observer:
        streams = [
            asyncio.create_task(ask(session, _body(index, case.tokens)))
            for index in range(case.streams)
        ]
        running_at_signal = 0
        while running_at_signal < case.streams and not any(stream.done() for stream in streams):
            running_at_signal = (await pools(observer))["running_requests"]
            await asyncio.sleep(0.02)
        start = last_signal = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        watch = asyncio.create_task(_watch(running, start))
        if case.second_signal_after is not None:
            await asyncio.sleep(case.second_signal_after)
            last_signal = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*streams)
        streams_seconds = time.monotonic() - start
        while running.process.poll() is None and time.monotonic() - start < _END_SECONDS:
            await asyncio.sleep(0.01)
        ended = time.monotonic()
        status = running.process.returncode
        return {
            "running_at_signal": running_at_signal,
            "streams": endings(answers),
            "events": sum(answer.events for answer in answers),
            "error": next((a.message for a in answers if a.ending == "error event"), None),
            **await watch,
            "streams_ended_seconds": streams_seconds,
            "exit_status": status,
            "seconds": ended - start,
            "seconds_after_last_signal": ended - last_signal,
            "seconds_after_timeout": ended - start - case.drain_seconds,
        }


def _body(index: int, tokens: int) -> dict[str, Any]:
    return {
        "model": _POOLS[index % len(_POOLS)],
        "prompt": f"def f{index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }


async def _watch(running: Server, start: float) -> dict[str, Any]:
    """Ask `/ready` until nobody answers; then ask for a completion once, as a new client."""
    not_ready, new = None, None
    async with running.observer() as session:
        while running.process.poll() is None:
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get("/ready") as response:
                    if response.status == 503 and new is None:
                        not_ready = time.monotonic() - start
                        new = await ask(session, _body(0, 1))
            await asyncio.sleep(0.02)
    return {"not_ready_after_seconds": not_ready, "new_request": _seen(new)}


def _seen(answer: Answer | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    return {"status": answer.status, "ending": answer.ending, "retry_after": answer.retry_after}


def run_case(case: Case, port: int | None) -> dict[str, Any]:
    """Run one case on a server of its own; return its figures and what the server left."""
    with server("--drain-timeout", str(case.drain_seconds), port=port) as running:
        processes = running.processes()
        segments = shared_memory_of(processes)
        result = asyncio.run(stop(running, case))
        time.sleep(1)
        result["left"] = {
            "processes": sum(map(is_alive, processes)),
            "shared_memory": sum(map(os.path.exists, segments)),
            "temporary_files": len(running.temporary_files()),
        }
    return result


def main() -> None:
    """Run every case, print its figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=200, help="streams at the signal [200]")
    parser.add_argument("--port", type=int, help="of the server [a free one]")
    args = parser.parse_args()
    result = {}
    for name, case in steps(cases(args.streams).items(), "cases"):
        result[name] = run_case(case, args.port)
        say(f"{name} {json.dumps(result[name], indent=1)}")
    print(f"appended to {append_result('reliability_drain', vars(args), result)}")


if __name__ == "__main__":
    main()
