"""Ray's view of the replicas becomes reports for our policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from emo_serve.ray_cluster.scaling import PoolPolicy, report


def context(now: float, *replicas: dict[str, float], target: int | None = None) -> Any:
    metrics: dict[str, dict[str, float]] = {}
    for number, values in enumerate(replicas):
        for name, value in values.items():
            metrics.setdefault(name, {})[f"r{number}"] = value
    return SimpleNamespace(
        aggregated_metrics=metrics,
        running_replicas=[f"r{number}" for number in range(len(replicas))],
        target_num_replicas=len(replicas) if target is None else target,
        current_time=now,
    )


def busy(running: float) -> dict[str, float]:
    return report(running=running, waiting_for_loads=0, hits=9, misses=0, concurrency=10)


def decide(policy: PoolPolicy, found: Any) -> int:
    return policy(found)[0]


def test_a_busy_fleet_grows_within_its_bounds() -> None:
    policy = PoolPolicy(2, 4)
    counts = [decide(policy, context(float(now), busy(20), busy(20))) for now in range(0, 70, 5)]
    assert counts[0] == 2
    assert counts[-1] == 4


def test_nothing_is_decided_before_all_have_reported() -> None:
    policy = PoolPolicy(1, 4)
    assert decide(policy, context(0.0, target=2)) == 2
    part = context(0.0, busy(20), {"running": 1.0})
    assert decide(policy, part) == 2
    assert decide(policy, context(0.0, busy(20), target=3)) == 3  # one still starts
