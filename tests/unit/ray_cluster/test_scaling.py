"""Ray's view of the replicas becomes reports for our policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from emo_serve.ray_cluster.scaling import PoolPolicy, report


def context(
    now: float, *replicas: dict[str, float], target: int | None = None, most: int = 4
) -> Any:
    metrics: dict[str, dict[str, float]] = {}
    for number, values in enumerate(replicas):
        for name, value in values.items():
            metrics.setdefault(name, {})[f"r{number}"] = value
    return SimpleNamespace(
        aggregated_metrics=metrics,
        running_replicas=[f"r{number}" for number in range(len(replicas))],
        target_num_replicas=len(replicas) if target is None else target,
        current_time=now,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
    )


def busy(running: float) -> dict[str, float]:
    return report(running=running, waiting_for_loads=0, hits=9, misses=0, concurrency=10)


def decide(policy: PoolPolicy, found: Any) -> int:
    return policy(found)[0]


def test_a_busy_fleet_grows_within_its_bounds() -> None:
    policy = PoolPolicy()
    counts = [decide(policy, context(float(now), busy(20), busy(20))) for now in range(0, 70, 5)]
    assert counts[0] == 2
    assert counts[-1] == 4
    assert decide(policy, context(75.0, busy(20), busy(20), most=3)) == 3


def test_a_config_may_say_how_long_the_policy_waits() -> None:
    policy = PoolPolicy(up_seconds=5.0)
    assert [decide(policy, context(now, busy(20), busy(20))) for now in (0.0, 10.0)] == [2, 4]


def test_few_requests_are_hits_or_misses_too() -> None:
    """Ray's means over its interval are well below one where requests are rare."""
    rare = report(running=1, waiting_for_loads=0, hits=0, misses=0, concurrency=10) | {
        "hits": 0.1,
        "misses": 0.3,
    }
    policy = PoolPolicy()
    assert [decide(policy, context(float(now), rare, rare)) for now in range(0, 40, 5)][-1] == 3


def test_nothing_is_decided_before_all_have_reported() -> None:
    policy = PoolPolicy()
    assert decide(policy, context(0.0, target=2)) == 2
    part = context(0.0, busy(20), {"running": 1.0})
    assert decide(policy, part) == 2
    assert decide(policy, context(0.0, busy(20), target=3)) == 3  # two still start
