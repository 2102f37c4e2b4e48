"""Eviction policies against Belady's optimum, by simulation of the real ResidencyManager.

Policies lru, lfu with three half-lives, pinned-first (preferring the two pools that the first tenth
of the trace asks for most) and belady play the same traces, at several numbers of slots per layer.
Only the engine is simulated, see `residency/simulation.py`; time is virtual, so that hours take
seconds and equal arguments give equal figures on any machine. Traces and pools are those of
`residency/traces.py`. Loads differ in how many requests run at once, on average: `light` has fewer
requests than pools, so that an idle pool can nearly always be evicted; in `busy` the manager must
close pools and wait for their requests; `overload` asks for more pools than can be loaded.

    python -m benchmarks.residency.policies                          # all: twenty minutes
    python -m benchmarks.residency.policies --pools demo --loads light
    python -m benchmarks.residency.policies --trace requests.jsonl   # a server's --request-log
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.residency.simulation import Belady, Link, simulate
from benchmarks.residency.traces import (
    Arrival,
    PoolSet,
    demo_pools,
    mean_overlap,
    read_trace,
    released_pools,
    zipf_trace,
)
from emo_serve.residency.policy import EvictionPolicy, LfuPolicy, LruPolicy, PinnedFirstPolicy

POLICIES = ("lru", "lfu-10", "lfu-60", "lfu-600", "pinned-first", "belady")
SLOTS = {"demo": (13, 16, 20, 24, 28), "released": (32, 48, 64, 96)}
# Assumed, not measured: a few milliseconds of calls; memory to device beside decoding.
LINKS = {"demo": Link(0.005, 0.5 * 2**30), "released": Link(0.02, 20 * 2**30)}
LOADS = {  # requests per second, seconds of service
    "demo": {"light": (10.0, 0.05), "busy": (10.0, 0.25), "overload": (20.0, 1.0)},
    "released": {"light": (4.0, 0.25), "busy": (6.0, 1.0), "overload": (16.0, 2.0)},
}
TRACES = {  # exponent, drifts per trace, requests per session
    "zipf-0.6": (0.6, 10, 1),
    "zipf-1.0": (1.0, 10, 1),
    "zipf-1.4": (1.4, 10, 1),
    "zipf-1.0-steady": (1.0, 0, 1),
    "zipf-1.0-sessions": (1.0, 10, 8),
}
_DIGITS = 4


@dataclass(frozen=True)
class Case:
    """One simulation; `trace` is a name of TRACES, or a recorded file."""

    pools: str
    load: str
    trace: str
    slots: int
    policy: str
    requests: int
    seed: int


@cache
def pool_set(name: str) -> PoolSet:
    """Return the set of pools with this name."""
    return demo_pools() if name == "demo" else released_pools()


@cache
def trace_of(pools: str, load: str, trace: str, requests: int, seed: int) -> Sequence[Arrival]:
    """Return the trace that a case plays."""
    if trace not in TRACES:
        return read_trace(Path(trace))
    exponent, drifts, session_requests = TRACES[trace]
    rate, service_seconds = LOADS[pools][load]
    return zipf_trace(
        list(pool_set(pools).pools),
        count=requests,
        rate=rate,
        service_seconds=service_seconds,
        exponent=exponent,
        drift_seconds=requests / rate / drifts if drifts else None,
        session_requests=session_requests,
        seed=seed,
    )


def make_policy(name: str, trace: Sequence[Arrival], pools: PoolSet) -> EvictionPolicy:
    """Build a policy by the name it has here."""
    if name == "belady":
        return Belady(trace, pools)
    if name == "pinned-first":
        start = [arrival.pool for arrival in trace[: len(trace) // 10]]
        favourites = sorted(set(start), key=lambda pool: (-start.count(pool), pool))[:2]
        return PinnedFirstPolicy([pools.pools[pool].content_hash for pool in favourites])
    kind, _, half_life = name.partition("-")
    return LfuPolicy(float(half_life)) if kind == "lfu" else LruPolicy()


def play(case: Case) -> dict[str, Any]:
    """Run one simulation; return its identity and its figures."""
    logging.disable(logging.CRITICAL)  # tens of thousands of loads
    pools = pool_set(case.pools)
    trace = trace_of(case.pools, case.load, case.trace, case.requests, case.seed)
    pools = pools.knowing(arrival.pool for arrival in trace)
    policy = make_policy(case.policy, trace, pools)
    outcome = simulate(trace, pools, case.slots, LINKS[case.pools], policy)
    figures = {
        name: round(value, _DIGITS) if isinstance(value, float) else value
        for name, value in outcome.figures().items()
    }
    where = {name: getattr(case, name) for name in ("pools", "load", "trace", "slots", "policy")}
    return {**where, "requests": len(trace), **figures}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield every simulation that the arguments ask for."""
    for pools in args.pools:
        for load in ["recorded"] if args.trace else args.loads:
            for trace in [str(args.trace)] if args.trace else args.traces:
                for slots in args.slots or SLOTS[pools]:
                    for policy in POLICIES:
                        yield Case(pools, load, trace, slots, policy, args.requests, args.seed)


TABLES = (
    ("hits of requests, %", lambda row: 100 * row["hit_rate"]),
    ("wait p50, ms", lambda row: 1e3 * row["wait_p50"]),
    ("wait p99, ms", lambda row: 1e3 * row["wait_p99"]),
    ("MiB copied per request", lambda row: 2**10 * row["gib_copied"] / row["requests"]),
    ("evictions in 100 requests", lambda row: 100 * row["evictions"] / row["requests"]),
    ("refused of requests, %", lambda row: 100 * (1 - row["served_share"])),
)


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Print, for each set of pools and load, each figure's mean over the traces."""
    for pools, load in dict.fromkeys((row["pools"], row["load"]) for row in rows):
        mine = [row for row in rows if (row["pools"], row["load"]) == (pools, load)]
        slots = sorted({row["slots"] for row in mine})
        for title, figure in TABLES:
            print(f"\n| {pools}, {load}: {title} | {' | '.join(f'{n} slots' for n in slots)} |")
            print("|---" * (len(slots) + 1) + "|")
            for policy in POLICIES:
                cells = [
                    mean(figure(r) for r in mine if (r["policy"], r["slots"]) == (policy, n))
                    for n in slots
                ]
                print(f"| {policy} | {' | '.join(f'{cell:.4g}' for cell in cells)} |")


def main() -> None:
    """Simulate, print tables, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pools", nargs="+", default=list(SLOTS), choices=SLOTS)
    parser.add_argument("--loads", nargs="+", default=list(LOADS["demo"]), choices=LOADS["demo"])
    parser.add_argument("--traces", nargs="+", default=list(TRACES), choices=TRACES)
    parser.add_argument("--slots", type=int, nargs="+", help="slots per layer [several]")
    parser.add_argument("--requests", type=int, default=3000, help="requests per trace [3000]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once [1]")
    parser.add_argument("--trace", type=Path, help="a recorded trace instead; needs --pools demo")
    args = parser.parse_args()
    if args.trace and args.pools != ["demo"]:
        parser.error("a recorded trace names pools of the demo: add --pools demo")
    overlaps = {}
    for name in args.pools:
        overlaps[name] = mean_overlap(list(pool_set(name).pools.values()))
        print(f"{name}: {len(pool_set(name).pools)} pools, mean overlap {overlaps[name]:.2f}")
    wanted = list(cases(args))
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs) as executor:
            played = executor.map(play, wanted)
            rows = [next(played) for _ in steps(wanted, "simulations")]
    else:
        rows = [play(case) for case in steps(wanted, "simulations")]
    print_tables(rows)
    result = {"rows": rows, "mean_overlap": overlaps}
    print(f"\nappended to {append_result('residency', vars(args), result)}")


if __name__ == "__main__":
    main()
