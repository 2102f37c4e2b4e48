"""How many replicas: the real Autoscaler on a simulated fleet, over a day of changing load.

The fleet is that of `cluster/simulation.py`, with the real router. Load rises from a quarter of its
peak to the peak and falls again, twice, and a crowd comes for one pool in between. A new replica
takes requests 40 seconds after it was asked for, with nothing resident; one that goes finishes what
it has. Beside our policy: a fixed fleet of the peak's size, one of the mean size that our policy
used, and a policy that looks at requests per replica only (what Ray Serve and Kubernetes do), with
the same target and the same delays.

    python -m benchmarks.cluster.autoscaling
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from benchmarks.cluster.fleet import Fleet, FleetSettings, play
from benchmarks.cluster.replica import Replica, ReplicaSize
from benchmarks.cluster.simulation import LINK, MAX_RUNNING, SERVICE_SECONDS, pool_set, without_logs
from benchmarks.cluster.traces import fleet_trace
from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.residency.traces import Arrival
from emo_serve.cluster.autoscaling import Autoscaler, ReplicaReport, ScalingLimits
from emo_serve.cluster.router import RouterLimits

_START_SECONDS = 40.0
_REPORT_SECONDS = 5.0
_DAYS = 2
_LOW = 0.25


class Policy(Protocol):
    """Decide how many replicas there should be."""

    def decide(self, reports: Sequence[ReplicaReport], now: float) -> int:
        """Return the number."""
        ...


class WorkOnly:
    """An Autoscaler that does not hear of loads and hits."""

    def __init__(self, limits: ScalingLimits) -> None:
        self._scaler = Autoscaler(limits)

    def decide(self, reports: Sequence[ReplicaReport], now: float) -> int:
        """Decide by all requests of a replica, waiting or not."""
        plain = [ReplicaReport(one.running + one.waiting_for_loads, 0.0, 0, 0) for one in reports]
        return self._scaler.decide(plain, now)


def day_trace(names: Sequence[str], peak_rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Thin a trace at the peak's rate so that load follows the time of day."""
    rng = random.Random(seed + 2)
    trace = fleet_trace(
        names,
        rate=peak_rate,
        seconds=seconds,
        service_seconds=SERVICE_SECONDS,
        exponent=1.0,
        num_drifts=5,
        crowd_share=0.25,
        seed=seed,
    )
    return [one for one in trace if rng.random() < _share_of_peak(one.at_seconds * _DAYS / seconds)]


def _share_of_peak(days: float) -> float:
    return _LOW + (1 - _LOW) * (1 - math.cos(2 * math.pi * days)) / 2


class Controller:
    """Report, decide and change the fleet, every few seconds; notes how many replicas were paid."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._before: dict[str, tuple[int, int]] = {}  # hits and misses
        self._starting: deque[float] = deque()  # when each will be ready
        self.paid: list[int] = []

    async def run(self, fleet: Fleet) -> None:
        """Go on until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            while self._starting and self._starting[0] <= clock():
                self._starting.popleft()
                fleet.add(1)
            reports = [self._report(one) for one in fleet.replicas.values()]
            wanted = self._policy.decide(reports, clock())
            missing = wanted - len(fleet.replicas) - len(self._starting)
            self._starting.extend([clock() + _START_SECONDS] * missing)
            if wanted < len(fleet.replicas) and not self._starting:
                fleet.remove(len(fleet.replicas) - wanted)
            self.paid.append(len(fleet.replicas) + len(self._starting))

    def _report(self, replica: Replica) -> ReplicaReport:
        stats = replica.manager.statistics()
        hits, misses = self._before.get(replica.name, (0, 0))
        self._before[replica.name] = stats.hits, stats.misses
        return ReplicaReport(
            stats.running_requests,
            stats.waiting_requests,
            stats.hits - hits,
            stats.misses - misses,
        )


@without_logs()
def simulate(
    name: str,
    make_policy: Callable[[ScalingLimits], Policy] | None,
    num_replicas: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Play the day with a policy, or with a fixed fleet."""
    pools = pool_set(args.pools)
    trace = day_trace(list(pools.pools), args.peak_rate, args.seconds, args.seed)
    size = ReplicaSize(args.slots, MAX_RUNNING, args.slots, LINK)
    settings = FleetSettings(num_replicas, RouterLimits.of(MAX_RUNNING), seed=args.seed)
    limits = ScalingLimits(2, args.max_replicas, MAX_RUNNING, down_seconds=args.down_seconds)
    controller = Controller(make_policy(limits)) if make_policy is not None else None
    run = controller.run if controller is not None else None
    figures = play(trace, pools, size, settings, "affinity", run).figures(args.seconds / 6)
    paid = controller.paid if controller is not None else [num_replicas]
    kept = ("requests", "hit_rate", "refused", "wait_p50", "wait_p99", "wait_mean")
    return {
        "policy": name,
        "mean_replicas": round(sum(paid) / len(paid), 2),
        "most_replicas": max(paid),
        **{figure: round(figures[figure], 4) for figure in kept},
    }


def main() -> None:
    """Simulate, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pools", type=int, default=60)
    parser.add_argument("--slots", type=int, default=64, help="per layer, of 128 experts [64]")
    parser.add_argument("--peak-rate", type=float, default=60.0, help="requests/s [60]")
    parser.add_argument("--seconds", type=float, default=1800.0, help="virtual time [1800]")
    parser.add_argument("--max-replicas", type=int, default=24)
    parser.add_argument("--down-seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = [simulate("work, loads and hits", Autoscaler, 4, args)]
    rows.append(simulate("work only", WorkOnly, 4, args))
    counts = {round(row["mean_replicas"]) for row in rows} | {rows[0]["most_replicas"]}
    for count in steps(sorted(counts), "fixed fleets"):
        rows.append(simulate(f"{count} replicas, fixed", None, count, args))
    print("| policy | replicas, mean | most | hits, % | wait p50, ms | wait p99, ms | refused, % |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (
            *(row["policy"], f"{row['mean_replicas']:.1f}", row["most_replicas"]),
            f"{100 * row['hit_rate']:.1f}",
            *(f"{1e3 * row[name]:.0f}" for name in ("wait_p50", "wait_p99")),
            f"{100 * row['refused']:.2f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\nappended to {append_result('cluster_autoscaling', vars(args), rows)}")


if __name__ == "__main__":
    main()
