"""Which replica gets a request: hit rate, loads, waits and balance of a fleet in virtual time.

The real PoolRouter and, in each replica, the real ResidencyManager; only engines and network are
stand-ins, see `cluster/replica.py` and `cluster/fleet.py`. Several proxies route. A proxy knows its
own requests, of others what a replica told it with its last answer, and which pools are resident as
of the last second. Beside it: round robin, power of two (the idler of two, by chance), consistent
hash (one replica for each pool), and an oracle that sees every replica as it is and takes the one
on which the request begins soonest.

Pools have the released model's sizes and overlap, made up of two layers for sixteen to save time.
Requests are Zipf; five times a pool of the less popular half becomes the most popular; and for a
fifth of the time a crowd comes for the least popular one, half as many requests again. Time is
virtual: equal arguments give equal figures on any machine.

    python -m benchmarks.cluster.simulation                       # half an hour
    python -m benchmarks.cluster.simulation --replicas 8 --pools 100
    python -m benchmarks.cluster.simulation --vary margins --replicas 8 --pools 100
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.cluster.fleet import FleetSettings, play
from benchmarks.cluster.replica import ReplicaSize
from benchmarks.cluster.strategies import STRATEGIES
from benchmarks.cluster.traces import fleet_trace
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.residency.simulation import Link
from benchmarks.residency.traces import PoolSet, released_pools
from emo_serve.cluster.router import RouterLimits

_LAYERS, _RELEASED_LAYERS = 2, 16
# Assumed, not measured: a few milliseconds of calls, memory to device beside decoding.
LINK = Link(0.02, 20 * 2**30)
MAX_RUNNING = 16
SERVICE_SECONDS = 1.0
_WARM_UP = 1 / 6
_DIGITS = 4

VARIED: dict[str, dict[str, dict[str, Any]]] = {
    "margins": {
        f"calm {calm}, spread {spread}": {"limits": RouterLimits(calm, spread)}
        for calm, spread in ((0, 0), (2, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32))
    },
    "memory": {
        f"memory {seconds:g} s": {"limits": RouterLimits(8, 16, memory_seconds=seconds)}
        for seconds in (0.0, 1.0, 5.0, 30.0)
    },
    "publishing": {
        f"every {seconds:g} s": {"publish_seconds": seconds} for seconds in (0.1, 1.0, 5.0, 30.0)
    },
    "proxies": {f"{count} proxies": {"num_proxies": count} for count in (1, 2, 8, 32)},
}
"""What `--vary` plays with the strategy `affinity`."""


@dataclass(frozen=True)
class Case:
    """One simulation."""

    replicas: int
    pools: int
    strategy: str
    rate: float
    seconds: float
    slots: int
    exponent: float
    seed: int
    varied: str = ""
    setting: str = ""


@cache
def pool_set(count: int) -> PoolSet:
    """Return pools of the released sizes, in fewer layers with larger experts."""
    made = released_pools(count=count, layers=_LAYERS)
    return replace(made, slot_bytes=made.slot_bytes * _RELEASED_LAYERS // _LAYERS)


@contextmanager
def without_logs() -> Iterator[None]:
    """Log nothing: a simulation makes tens of thousands of loads."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@without_logs()
def simulate(case: Case) -> dict[str, Any]:
    """Run one simulation; return its identity and its figures."""
    pools = pool_set(case.pools)
    trace = fleet_trace(
        list(pools.pools),
        rate=case.rate * case.replicas,
        seconds=case.seconds,
        service_seconds=SERVICE_SECONDS,
        exponent=case.exponent,
        num_drifts=5,
        crowd_share=0.5,
        seed=case.seed,
    )
    size = ReplicaSize(case.slots, MAX_RUNNING, case.slots, LINK)
    settings = FleetSettings(case.replicas, RouterLimits.of(MAX_RUNNING), seed=case.seed)
    if case.varied:
        settings = replace(settings, **VARIED[case.varied][case.setting])
    outcome = play(trace, pools, size, settings, case.strategy)
    figures = {
        name: round(value, _DIGITS) if isinstance(value, float) else value
        for name, value in outcome.figures(_WARM_UP * case.seconds).items()
    }
    return {
        **{name: getattr(case, name) for name in ("replicas", "pools", "strategy", "seed")},
        **({"setting": case.setting} if case.varied else {}),
        **figures,
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield every simulation that the arguments ask for."""
    for replicas in args.replicas:
        for pools in args.pools:
            for seed in range(1, args.seeds + 1):
                case = Case(
                    *(replicas, pools, "affinity", args.rate, args.seconds),
                    *(args.slots, args.exponent, seed),
                )
                if args.vary:
                    for setting in VARIED[args.vary]:
                        yield replace(case, varied=args.vary, setting=setting)
                else:
                    for strategy in args.strategies:
                        yield replace(case, strategy=strategy)


COLUMNS = (
    ("hits, %", lambda row: 100 * row["hit_rate"]),
    ("loads per 100", lambda row: row["loads_per_100"]),
    ("wait p50, ms", lambda row: 1e3 * row["wait_p50"]),
    ("wait p99, ms", lambda row: 1e3 * row["wait_p99"]),
    ("busiest / mean", lambda row: row["imbalance"]),
    ("refused, %", lambda row: 100 * row["refused"]),
    ("messages/s", lambda row: row["messages_per_second"]),
)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line for each case, means over seeds."""
    print(f"| replicas | pools | | {' | '.join(title for title, _ in COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    places = dict.fromkeys(_place(row) for row in rows)
    for place in places:
        mine = [row for row in rows if _place(row) == place]
        cells = (sum(map(figure, mine)) / len(mine) for _, figure in COLUMNS)
        print(f"| {' | '.join(map(str, place))} | {' | '.join(f'{c:.4g}' for c in cells)} |")


def _place(row: dict[str, Any]) -> tuple[object, ...]:
    return row["replicas"], row["pools"], row.get("setting", row["strategy"])


def main() -> None:
    """Simulate, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--pools", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--vary", choices=VARIED, help="settings of our router, and no other")
    parser.add_argument("--rate", type=float, default=6.0, help="requests/s per replica [6]")
    parser.add_argument("--seconds", type=float, default=120.0, help="virtual time [120]")
    parser.add_argument("--slots", type=int, default=64, help="per layer, of 128 experts [64]")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law [1]")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for case in steps(list(cases(args)), "simulations"):
        rows.append(simulate(case))
        say(rows[-1])
    print_table(rows)
    print(f"\nappended to {append_result('cluster', vars(args), rows)}")


if __name__ == "__main__":
    main()
