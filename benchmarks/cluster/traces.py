"""Requests for a fleet: Zipf with a drift, and a crowd that comes for one pool all at once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from benchmarks.residency.traces import Arrival, zipf_trace

__all__ = ["CROWD", "fleet_trace"]

CROWD = (0.5, 0.7)
"""The part of the trace in which the crowd is there."""


def fleet_trace(
    names: Sequence[str],
    *,
    rate: float,
    seconds: float,
    service_seconds: float,
    exponent: float,
    num_drifts: int,
    crowd_share: float,
    seed: int,
) -> list[Arrival]:
    """Draw requests at `rate` per second; during CROWD come `crowd_share` times as many more.

    The crowd asks for one pool, the least popular so far. Services are exponential.
    """
    trace = zipf_trace(
        names,
        count=round(rate * seconds),
        rate=rate,
        service_seconds=service_seconds,
        exponent=exponent,
        drift_seconds=seconds / num_drifts if num_drifts else None,
        session_requests=1,
        seed=seed,
    )
    rng = random.Random(seed + 1)
    start, end = (share * seconds for share in CROWD)
    asked = Counter(arrival.pool for arrival in trace if arrival.at_seconds < start)
    pool = min(names, key=lambda name: (asked[name], name))
    now = start
    while crowd_share and (now := now + rng.expovariate(rate * crowd_share)) < end:
        trace.append(Arrival(now, pool, rng.expovariate(1 / service_seconds)))
    return sorted(trace, key=lambda arrival: arrival.at_seconds)
