"""Ray Serve's autoscaling policy around ours: what replicas report, and how many there should be.

Ray asks the policy in its controller, every few seconds. The reports are means over the last
interval, so shares of hits mean what they say while requests come. Limits of the policy may stand
in a Serve config, as `policy_kwargs`; how many replicas there may be is Ray's to say, at any time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from emo_serve.cluster.autoscaling import Autoscaler, ReplicaReport, ScalingLimits

__all__ = ["PoolPolicy", "report"]

_FIELDS = ("running", "waiting_for_loads", "hits", "misses", "concurrency")


def report(
    *, running: float, waiting_for_loads: float, hits: int, misses: int, concurrency: int
) -> dict[str, float]:
    """Return what a replica reports: requests now, and pools found since its last report."""
    values = (running, waiting_for_loads, hits, misses, concurrency)
    return dict(zip(_FIELDS, map(float, values), strict=True))


class PoolPolicy:
    """Decide by work, waits for loads and hits; see `emo_serve.cluster.autoscaling`.

    `limits` are fields of its ScalingLimits, without the numbers of replicas and the concurrency.
    """

    def __init__(self, **limits: float) -> None:
        self._limits = ScalingLimits(1, 1, 1, **limits)
        self._scaler: Autoscaler | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be, and a state that Ray need not keep."""
        found = _by_replica(context.aggregated_metrics or {})
        target: int = context.target_num_replicas
        running = len(context.running_replicas)
        if not found or len(found) < running:
            return target, {}  # some have not reported yet
        limits = replace(
            self._limits,
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            concurrency=max(1, int(min(one["concurrency"] for one in found.values()))),
        )
        if self._scaler is None:
            self._scaler = Autoscaler(limits)
        self._scaler.limits = limits
        reports = [
            ReplicaReport(one["running"], one["waiting_for_loads"], one["hits"], one["misses"])
            for one in found.values()
        ]
        now = context.current_time
        return self._scaler.decide(reports, time.time() if now is None else now, target), {}


def _by_replica(metrics: Mapping[str, Mapping[Any, float]]) -> dict[Any, dict[str, float]]:
    """Return the reports of the replicas that have reported everything."""
    replicas = set.intersection(*(set(metrics.get(name, ())) for name in _FIELDS))
    return {one: {name: metrics[name][one] for name in _FIELDS} for one in replicas}
