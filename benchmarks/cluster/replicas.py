"""Two real replicas of the shipped model: what the router is worth, and what they take of memory.

Four clients stream completions of 16 tokens from ten pools, whose popularity follows Zipf's law,
one after another; each replica has slots for two pools. Before each seed's trace, nothing is
resident. Round robin and power of two (Ray Serve's default) are routers of Ray's kind in the same
proxy. Hits and loads are the replicas' own counts; imbalance is the busier replica's requests over
the mean.

    python -m benchmarks.cluster.replicas --router affinity
    python -m benchmarks.cluster.replicas --router round-robin
    python -m benchmarks.cluster.replicas --router power-of-two
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from benchmarks.cluster.on_ray import ROUTERS, Account, RealFleet, by_role, memory, running
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import RESULTS, append_result
from benchmarks.harness.streams import stream_completion
from benchmarks.residency.simulation import quantile
from emo_serve import demo

__all__ = ["figures_of", "zipf_pools"]

_TOKENS = 16
_SECONDS = 120.0


def zipf_pools(count: int, seed: int) -> list[str]:
    """Draw pools of the shipped model by Zipf's law; the seed says which is popular, too."""
    rng = random.Random(seed)
    pools = sorted(demo.domains())
    rng.shuffle(pools)
    return rng.choices(pools, [1 / (rank + 1) for rank in range(len(pools))], k=count)


async def first_token_seconds(url: str, trace: Sequence[str], clients: int) -> list[float]:
    """Stream one completion for each pool of a trace; return the seconds to first token."""
    todo, found = iter(trace), []

    async def client(http: httpx.AsyncClient, todo: Iterator[str]) -> None:
        for pool in todo:
            body = {"model": pool, "prompt": "the ", "max_tokens": _TOKENS, "temperature": 0}
            seconds, headers = await stream_completion(http, body)
            assert headers["x-emo-pool"] == pool
            found.append(seconds)

    async with httpx.AsyncClient(base_url=url, timeout=_SECONDS) as http:
        await asyncio.gather(*(client(http, todo) for _ in range(clients)))
    return found


def figures_of(accounts: Sequence[Account], firsts: Sequence[float]) -> dict[str, Any]:
    """Return a trace's figures, from what each replica did in it and the times to first token."""
    asked = [one.hits + one.misses for one in accounts]
    ordered = sorted(firsts)
    return {
        "requests": len(ordered),
        "hit_rate": round(sum(one.hits for one in accounts) / sum(asked), 3),
        "loads": sum(one.loads for one in accounts),
        "ttft_p50_ms": round(1e3 * quantile(ordered, 0.5)),
        "ttft_p95_ms": round(1e3 * quantile(ordered, 0.95)),
        "imbalance": round(max(asked) * len(asked) / sum(asked), 2),
    }


def play(fleet: RealFleet, trace: Sequence[str], clients: int) -> dict[str, Any]:
    """Play one trace from a cold start."""
    fleet.evict_all()
    before, start = fleet.accounts(), time.perf_counter()
    firsts = asyncio.run(first_token_seconds(fleet.url, trace, clients))
    seconds = time.perf_counter() - start
    done = [account.since(before[name]) for name, account in fleet.accounts().items()]
    return {**figures_of(done, firsts), "seconds": round(seconds, 1)}


def main() -> None:
    """Start the replicas, play the traces, print a table, append a result per trace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--router", choices=sorted(ROUTERS), default="affinity")
    parser.add_argument("--requests", type=int, default=200, help="per seed [200]")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    with running(router=args.router) as fleet:
        asyncio.run(first_token_seconds(fleet.url, zipf_pools(20, seed=0), args.clients))
        say("| router | seed | hits | loads | TTFT p50 | p95 | busier / mean | seconds |")
        say("|---|---|---|---|---|---|---|---|")
        for seed in steps(args.seeds, "seeds"):
            row = play(fleet, zipf_pools(args.requests, seed), args.clients)
            taken = memory(by_role())
            result = {"router": args.router, "seed": seed, **row, "memory": taken}
            append_result("cluster_replicas", vars(args), result)
            cells = [args.router, seed, f"{100 * row['hit_rate']:.0f} %", row["loads"]]
            cells += [f"{row[name]} ms" for name in ("ttft_p50_ms", "ttft_p95_ms")]
            say(f"| {' | '.join(map(str, [*cells, row['imbalance'], row['seconds']]))} |")
    for role, amounts in taken.items():
        say(f"{role}: {amounts}")
    say(f"appended to {RESULTS / 'cluster_replicas.jsonl'}")


if __name__ == "__main__":
    main()
