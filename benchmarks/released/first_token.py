"""Time to first token of a miss at the released size: the whole pool first, or its best experts.

One server with slots for two pools of 16 experts per layer. One pool stays and answers no or four
streams all the time; the others are asked for in turn and evicted after each answer, so that every
request is a miss. Each is asked twice: with `x-emo-min-experts: all` the request waits for the
whole pool, with 4 it begins when the four best experts of every layer have come. Random weights:
nothing is said about accuracy.

    python -m benchmarks.released.first_token --layers 4
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.pairs import Spread
from benchmarks.harness.progress import steps
from benchmarks.harness.random_checkpoint import write_pools
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.harness.streams import beside, stream_completion
from benchmarks.released.checkpoint import checkpoint_of
from benchmarks.released.serving import FLAGS, POOL_SIZE, POOLS, prompts_of
from emo_serve.names import split_size

_STREAMED, *_ASKED = POOLS
_STREAMS = 4


async def first_token(http: httpx.AsyncClient, pool: str, least: str) -> tuple[float, int]:
    """Ask for a pool that is not resident; return seconds, and experts per layer that answered."""
    body = {"model": pool, "prompt": prompts_of(pool)[0][:8], "max_tokens": 8}
    seconds, headers = await stream_completion(http, body, {"x-emo-min-experts": least})
    return seconds, split_size(headers["x-emo-pool"])[1] or POOL_SIZE


async def keep_streaming(http: httpx.AsyncClient) -> None:
    """Keep one stream of the pool that stays going."""
    for prompt in cycle(prompts_of(_STREAMED)):
        body = {"model": _STREAMED, "prompt": prompt[:8], "max_tokens": 256}
        await stream_completion(http, body)


async def evict(http: httpx.AsyncClient, pool: str) -> None:
    """Wait until a pool, still loading its last experts, is whole, and evict it."""
    while (await http.get(f"/v1/pools/{pool}")).json()["state"] == "loading":
        await asyncio.sleep(0.02)
    (await http.post(f"/v1/pools/{pool}/evict")).raise_for_status()


async def measure(url: str, rounds: int, least: int, streams: int) -> dict[str, Any]:
    """Return the times of both ways, and the ratio of each round."""
    times: dict[str, list[float]] = {"all": [], str(least): []}
    sizes: list[int] = []
    async with (
        httpx.AsyncClient(base_url=url, timeout=300) as http,
        beside(keep_streaming(http) for _ in range(streams)),
    ):
        for turn, pool in zip(steps(range(rounds + 1), "rounds"), cycle(_ASKED), strict=False):
            for way, seconds in times.items():
                taken, size = await first_token(http, pool, way)
                await evict(http, pool)
                if turn:  # the first warms up
                    seconds.append(taken)
                    if way != "all":
                        sizes.append(size)
    waited, began = times["all"], times[str(least)]
    return {
        "streams": streams,
        "whole_seconds": statistics.median(waited),
        "first_experts_seconds": statistics.median(began),
        "ratio": Spread.of_ratios(list(zip(waited, began, strict=True))).to_json(),
        "sizes": {size: sizes.count(size) for size in sorted(set(sizes))},
    }


def rows_of(url: str, rounds: int, least: int) -> list[dict[str, Any]]:
    """Measure beside no streams and beside some, and print each row."""
    print("| streams | whole pool, s | first experts, s | ratio (min-max) | sizes that answered |")
    print("|---|---|---|---|---|")
    rows = []
    for streams in (0, _STREAMS):
        row = asyncio.run(measure(url, rounds, least, streams))
        whole, first = row["whole_seconds"], row["first_experts_seconds"]
        ratio = Spread(**row["ratio"])
        print(f"| {streams} | {whole:.3f} | {first:.3f} | {ratio} | {row['sizes']} |", flush=True)
        rows.append(row)
    return rows


def command_of(model: Path, pools: Path) -> list[str]:
    """Return the command of a server that has room for the streamed pool and one of the others."""
    command = [sys.executable, "-m", "emo_serve", "serve", str(model), "--pools", str(pools)]
    command += ["--expert-slots", str(2 * POOL_SIZE), "--preload", _STREAMED]
    return [*command, *FLAGS, "--enforce-eager"]


def main() -> None:
    """Make the checkpoint, start the server, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds [9]")
    parser.add_argument("--least", type=int, default=4, help="experts to begin with [4]")
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--directory", type=Path, help="for the temporary checkpoint")
    args = parser.parse_args()
    with ExitStack() as stack:
        place, model = stack.enter_context(checkpoint_of(args))
        pools = write_pools(place / "pools", model, list(POOLS), POOL_SIZE)
        server = stack.enter_context(ServerProcess(command_of(model, pools)))
        rows = rows_of(server.url, args.rounds, args.least)
    append_result("released_first_token", vars(args), {"rows": rows})


if __name__ == "__main__":
    main()
