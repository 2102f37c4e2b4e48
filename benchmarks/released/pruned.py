"""One server with four pools against what does without pools: a vLLM process per pruned checkpoint.

Each of four pools of 16 experts is exported as a checkpoint of its own and served by vLLM's own API
server; emo-serve holds the same four in one slab. Both get the same requests in turn: eight
clients, spread evenly over the four domains or most of them in one. All of A's processes are
suspended while B is measured. Random weights of the released sizes.

    python -m benchmarks.released.pruned --layers 4
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.page_cache import drop_from_page_cache
from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.random_checkpoint import write_pools
from benchmarks.harness.results import append_result
from benchmarks.released.checkpoint import checkpoint_of
from benchmarks.released.serving import POOL_SIZE, POOLS, Server
from benchmarks.serving.throughput import load

_TRAFFIC = {"even": (2, 2, 2, 2), "skewed": (5, 1, 1, 1)}
_PROMPT, _TOKENS, _REQUESTS = 8, 24, 2
_KV_CACHE_BYTES = 2**28
"""Ample for eight clients; five servers with 1 GiB each would not fit beside their checkpoints."""


class OfDomain(Server):
    """One domain's server: its own process with a pruned checkpoint."""

    def __init__(self, domain: str, checkpoint: Path, flags: Sequence[str]) -> None:
        super().__init__("stock", checkpoint, checkpoint, flags)
        self.pools = (domain,)


class Domain:
    """One domain's requests to a server of all; has what `load` asks for."""

    def __init__(self, server: Server, domain: str) -> None:
        self.url, self.kind, self.pools = server.url, server.kind, (domain,)
        self.model_of, self.texts_of = server.model_of, server.texts_of


def export(model: Path, pools: Path, domain: str, out: Path) -> Path:
    """Write a pool as a checkpoint of its own."""
    command = [sys.executable, "-m", "emo_serve", "pools", "export", str(pools / f"{domain}.json")]
    subprocess.run([*command, "--model", str(model), "--out", str(out)], check=True)
    return out


def rate(targets: Sequence[Any], clients: Sequence[int]) -> float:
    """Load all targets at once, each with its number of clients; return tokens per second."""

    async def all_at_once() -> None:
        await asyncio.gather(
            *(
                load(target, number, _REQUESTS, _TOKENS, prompt_characters=_PROMPT)
                for target, number in zip(targets, clients, strict=True)
            )
        )

    start = time.perf_counter()
    asyncio.run(all_at_once())
    return sum(clients) * _REQUESTS * _TOKENS / (time.perf_counter() - start)


def main() -> None:
    """Make the checkpoints, start the servers, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds [5]")
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--directory", type=Path, help="for the temporary checkpoints")
    parser.add_argument("--cold", action="store_true", help="servers start from the disk")
    args = parser.parse_args()
    flags = ["--enforce-eager", "--kv-cache-memory-bytes", str(_KV_CACHE_BYTES)]
    with ExitStack() as stack:
        place, model = stack.enter_context(checkpoint_of(args))
        pools = write_pools(place / "pools" / "four", model, list(POOLS), POOL_SIZE)
        pruned = [export(model, pools, domain, place / domain) for domain in POOLS]
        for checkpoint in [model, *pruned] if args.cold else []:
            drop_from_page_cache(checkpoint)
        started = time.perf_counter()
        alone = [
            stack.enter_context(OfDomain(domain, checkpoint, flags))
            for domain, checkpoint in zip(POOLS, pruned, strict=True)
        ]
        starts = {"pruned": time.perf_counter() - started}
        for server in alone:
            server.pause()
        ours = stack.enter_context(Server("four", model, place / "pools", flags))
        starts["pools"] = ours.start_seconds
        ours.pause()
        memory = {
            "pruned": sum(server.own_bytes() for server in alone) / 2**30,
            "pools": ours.own_bytes() / 2**30,
        }
        print(f"GiB: {memory}; seconds to start: {starts}")
        rows = [compare(alone, ours, kind, args.rounds) for kind in _TRAFFIC]
    outcome = {"rows": rows, "gib": memory, "start_seconds": starts}
    append_result("released_pruned", vars(args), outcome)


def compare(alone: Sequence[Server], ours: Server, kind: str, rounds: int) -> dict[str, Any]:
    """Load both in turn with one kind of traffic; return medians and the spread of the ratio."""
    clients = _TRAFFIC[kind]
    domains = [Domain(ours, domain) for domain in POOLS]

    def measure(targets: Sequence[Any], servers: Sequence[Server]) -> float:
        with ExitStack() as stack:
            for server in servers:
                stack.enter_context(server.running())
            return rate(targets, clients)

    pairs = in_turn(rounds, partial(measure, alone, alone), partial(measure, domains, [ours]))
    ratio = Spread.of_ratios(pairs)
    rates = [statistics.median(each) for each in zip(*pairs, strict=True)]
    print(f"| {kind} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio} |", flush=True)
    figures = {"tokens_per_second": rates, "ratio": ratio.to_json()}
    return {"traffic": kind, "clients": clients, **figures}


if __name__ == "__main__":
    main()
