"""What open tabs of the console cost the server: the front end's share of a core, with and without.

A server of the shipped model with room for some of its pools. Each tab is what the page does: it
follows /v1/residency/events and asks /ready every 15 seconds. Windows without and with tabs take
turns, under two loads:

    idle     nothing happens
    paced    `--rate` requests per second, each of one token, every one in the next pool: requests,
             hits, loads and evictions change all the time, so every snapshot is a new one

The front end is the server's first process; its CPU time is the kernel's account of it, user and
system. Three minutes with two cores.

    python -m benchmarks.serving.console
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from itertools import count, cycle
from typing import Any

import httpx
import psutil

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.harness.streams import beside

__all__ = ["main"]

_READY_SECONDS = 15.0
_SLOTS = 16
_SETTLE_SECONDS = 2.0


class Tabs:
    """Open tabs, and how many events and bytes they have got."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.events = self.bytes = 0

    async def stay_open(self) -> None:
        """Do what one tab does, until it is cancelled."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            asking = asyncio.create_task(self._ask_ready(client))
            try:
                async with client.stream("GET", "/v1/residency/events") as answer:
                    async for data in answer.aiter_bytes():
                        self.events += data.count(b"\nevent: ") + data.startswith(b"event: ")
                        self.bytes += len(data)
            finally:
                asking.cancel()

    async def _ask_ready(self, client: httpx.AsyncClient) -> None:
        while True:
            await client.get("/ready")
            await asyncio.sleep(_READY_SECONDS)


async def paced(url: str, rate: float) -> None:
    """Send requests at this rate, each in the next pool, until it is cancelled."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        cards = (await client.get("/v1/pools")).json()["data"]
        names = [card["name"] for card in cards if card["kind"] == "pool"]
        start, loop = asyncio.get_running_loop().time(), asyncio.get_running_loop()
        for number, name in zip(count(), cycle(names)):
            await asyncio.sleep(max(0.0, start + number / rate - loop.time()))
            body = {"model": name, "prompt": f"{number} is ", "max_tokens": 1}
            (await client.post("/v1/completions", json=body)).raise_for_status()


def seconds_of(process: psutil.Process) -> float:
    """Return the CPU time that a process has used, its children apart."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def window(
    server: ServerProcess, tabs: int, rate: float | None, seconds: float
) -> dict[str, Any]:
    """Return the front end's share of a core during one window, and what the tabs got."""
    front_end, book = psutil.Process(server.process.pid), Tabs(server.url)
    asking = [book.stay_open() for _ in range(tabs)]
    if rate is not None:
        asking.append(paced(server.url, rate))
    async with beside(asking) as tasks:
        await asyncio.sleep(_SETTLE_SECONDS)
        before, loop = seconds_of(front_end), asyncio.get_running_loop()
        events, sent, start = book.events, book.bytes, loop.time()
        await asyncio.sleep(seconds)
        passed = loop.time() - start
        share = (seconds_of(front_end) - before) / passed
        faults = [task.exception() for task in tasks if task.done()]
        assert not faults, faults
    return {
        "share": share,
        "events_per_second": (book.events - events) / passed,
        "bytes_per_second": (book.bytes - sent) / passed,
    }


async def compare(server: ServerProcess, args: argparse.Namespace) -> dict[str, Any]:
    """Return the windows of every load, without tabs and with them in turn."""
    found: dict[str, Any] = {}
    for load, rate in (("idle", None), ("paced", args.rate)):
        windows: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
        for _ in steps(range(args.rounds), load):
            windows["without"].append(await window(server, 0, rate, args.seconds))
            windows["with"].append(await window(server, args.tabs, rate, args.seconds))
        found[load] = windows
    return found


def print_table(found: dict[str, Any], tabs: int) -> None:
    """Print the medians over windows."""
    print(f"| load | front end alone | with {tabs} tabs | the tabs | events/s of a tab | KiB/s |")
    print("|---|---|---|---|---|---|")
    for load, windows in found.items():
        shares = {
            kind: statistics.median(one["share"] for one in each) for kind, each in windows.items()
        }
        events, sent = (
            statistics.median(one[name] for one in windows["with"]) / tabs
            for name in ("events_per_second", "bytes_per_second")
        )
        print(
            f"| {load} | {shares['without']:.2%} | {shares['with']:.2%}"
            f" | {shares['with'] - shares['without']:.2%} | {events:.2f} | {sent / 1024:.1f} |"
        )


def main() -> None:
    """Measure both loads, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tabs", type=int, default=10, help="[10]")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second [2]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one window [10]")
    parser.add_argument("--rounds", type=int, default=3, help="of one window each [3]")
    args = parser.parse_args()
    command = [sys.executable, "-m", "emo_serve", "serve", "--expert-slots", str(_SLOTS)]
    with ServerProcess([*command, "--enforce-eager"]) as server:
        found = asyncio.run(compare(server, args))
    print_table(found, args.tabs)
    print(f"appended to {append_result('console', vars(args), found)}")


if __name__ == "__main__":
    main()
