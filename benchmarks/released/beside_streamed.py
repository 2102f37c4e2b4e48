"""What the streams of a resident pool feel of a streamed one, at the released size on a CPU.

A server keeps one pool of 16 experts per layer resident, with slots for half of the experts, so the
base pool is streamed. One stream of the pool is measured alone, then beside one or more streams of
the base pool; prompts have 8 tokens. Two servers, in turn:

    turns   streamed requests have steps of their own, and a fifth of the time
    mixed   all requests share steps, by vLLM's own scheduler

The weights are random, so nothing is said about accuracy.

    python -m benchmarks.released.beside_streamed --layers 4
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.random_checkpoint import write_pools
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.harness.streams import beside, token_times
from benchmarks.released.checkpoint import checkpoint_of
from benchmarks.released.serving import (
    FLAGS,
    POOL_SIZE,
    POOLS,
    num_experts,
    prompts_of,
)

_KINDS = {"turns": (), "mixed": ("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler")}
_RESIDENT, _OTHER = POOLS[:2]  # the other's prompts are asked of the base pool
_PROMPT = 8


class Gaps(NamedTuple):
    """Seconds between two tokens of a stream."""

    mean: float
    longest: float


class Beside(NamedTuple):
    """The pool's stream alone and beside, and the base pool's tokens/s meanwhile."""

    alone: Gaps
    beside: Gaps
    streamed_rate: float


class Tokens:
    """Count the tokens of endless streams of the base pool."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http, self.count = http, 0

    async def stream(self) -> None:
        """Answer one completion after the other in the base pool."""
        for prompt in cycle(prompts_of(_OTHER)):
            body = {"model": "base", "prompt": prompt[:_PROMPT], "max_tokens": 256}
            async for _ in token_times(self.http, body):
                self.count += 1


async def gaps_of(http: httpx.AsyncClient, tokens: int) -> Gaps:
    """Stream one completion in the resident pool."""
    prompt = prompts_of(_RESIDENT)[0][:_PROMPT]
    body = {"model": _RESIDENT, "prompt": prompt, "max_tokens": tokens}
    times = [at async for at in token_times(http, body)]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return Gaps(statistics.mean(gaps), max(gaps))


async def measure(url: str, tokens: int, streams: int) -> Beside:
    """Measure alone, then beside streams of the base pool once each of them has begun."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        alone = await gaps_of(http, tokens)
        counts = [Tokens(http) for _ in range(streams)]
        async with beside(each.stream() for each in counts):
            while not all(each.count for each in counts):
                await asyncio.sleep(0.02)
            before = sum(each.count for each in counts)
            began = asyncio.get_running_loop().time()
            felt = await gaps_of(http, tokens)
            seconds = asyncio.get_running_loop().time() - began
            count = sum(each.count for each in counts) - before
        return Beside(alone, felt, count / seconds)


def measure_paused(server: ServerProcess, tokens: int, streams: int) -> Beside:
    """Measure a server that is suspended before and after."""
    with server.running():
        return asyncio.run(measure(server.url, tokens, streams))


def row_of(kind: str, samples: list[Beside]) -> dict[str, Any]:
    """Return the medians, and the ratios beside to alone, by round."""
    row: dict[str, Any] = {"kind": kind}
    for what in Gaps._fields:
        pairs = [[getattr(s.alone, what), getattr(s.beside, what)] for s in samples]
        medians = [1e3 * statistics.median(each) for each in zip(*pairs, strict=True)]
        row[what] = {"ms": medians, "ratio": Spread.of_ratios(pairs).to_json()}
    row["streamed_tokens_per_second"] = statistics.median(s.streamed_rate for s in samples)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        "| steps | mean gap alone, beside, ms | ratio (min-max) | longest gap, ms"
        " | ratio (min-max) | base pool, tokens/s |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        cells = [row["kind"]]
        for what in Gaps._fields:
            alone, felt = row[what]["ms"]
            cells += [f"{alone:.1f}, {felt:.1f}", str(Spread(**row[what]["ratio"]))]
        print(f"| {' | '.join(cells)} | {row['streamed_tokens_per_second']:.2f} |", flush=True)


def main() -> None:
    """Make the checkpoint, start the servers, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds [5]")
    parser.add_argument("--tokens", type=int, default=64, help="of the measured stream [64]")
    parser.add_argument("--streams", type=int, default=1, help="of the base pool [1]")
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--directory", type=Path, help="for the temporary checkpoint")
    args = parser.parse_args()
    with ExitStack() as stack:
        place, model = stack.enter_context(checkpoint_of(args))
        pools = write_pools(place / "pools", model, [_RESIDENT], POOL_SIZE)
        command = [sys.executable, "-m", "emo_serve", "serve", str(model), "--pools", str(pools)]
        command += ["--expert-slots", str(num_experts(model) // 2), *FLAGS, "--enforce-eager"]
        servers = []
        for flags in _KINDS.values():
            servers.append(stack.enter_context(ServerProcess([*command, *flags])))
            servers[-1].pause()
        measures = [partial(measure_paused, each, args.tokens, args.streams) for each in servers]
        samples = zip(*in_turn(args.rounds, *measures), strict=True)
        rows = [row_of(kind, list(each)) for kind, each in zip(_KINDS, samples, strict=True)]
    show(rows)
    append_result("released_beside_streamed", vars(args), {"rows": rows})


if __name__ == "__main__":
    main()
