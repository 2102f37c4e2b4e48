"""Every metric name, and what moves it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot

SNAPSHOT = MetricsSnapshot(
    pools=(
        PoolSnapshot("base", is_resident=False, running_requests=0),
        PoolSnapshot("math", is_resident=True, running_requests=2),
        PoolSnapshot("code+math", is_resident=True, running_requests=3),
        PoolSnapshot("law+math", is_resident=True, running_requests=1),
    ),
    slots=64,
    slots_in_use=12,
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PoolMetrics:
    return PoolMetrics(registry, ["base", "math"], ["unknown_pool"], lambda: SNAPSHOT)


def test_everything_is_shown_before_the_first_request(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    names = {metric.name for metric in registry.collect()}
    assert names == {
        "emo_serve_requests",
        "emo_serve_prompt_tokens",
        "emo_serve_generation_tokens",
        "emo_serve_refused_requests",
        "emo_serve_running_requests",
        "emo_serve_pool_resident",
        "emo_serve_slots",
        "emo_serve_slots_in_use",
    }
    for pool in ("base", "math", "(union)"):
        labels = {"pool": pool, "outcome": "finished"}
        assert registry.get_sample_value("emo_serve_requests_total", labels) == 0


def test_counters_count(registry: CollectorRegistry, metrics: PoolMetrics) -> None:
    metrics.count_request("math", "finished")
    metrics.count_request("code+math", "aborted")
    metrics.count_tokens("math", prompt_tokens=7, generation_tokens=3)
    metrics.count_refusal("unknown_pool")
    for name, labels, value in (
        ("requests_total", {"pool": "math", "outcome": "finished"}, 1),
        ("requests_total", {"pool": "(union)", "outcome": "aborted"}, 1),
        ("prompt_tokens_total", {"pool": "math"}, 7),
        ("generation_tokens_total", {"pool": "math"}, 3),
        ("refused_requests_total", {"reason": "unknown_pool"}, 1),
    ):
        assert registry.get_sample_value(f"emo_serve_{name}", labels) == value


def test_gauges_are_the_snapshot_and_unions_share_a_label(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    for name, labels, value in (
        ("running_requests", {"pool": "math"}, 2),
        ("running_requests", {"pool": "(union)"}, 4),
        ("pool_resident", {"pool": "math"}, 1),
        ("pool_resident", {"pool": "base"}, 0),
        ("slots", {}, 64),
        ("slots_in_use", {}, 12),
    ):
        assert registry.get_sample_value(f"emo_serve_{name}", labels) == value
    assert registry.get_sample_value("emo_serve_pool_resident", {"pool": "(union)"}) is None


def test_the_registry_is_the_callers() -> None:
    for _ in range(2):
        PoolMetrics(CollectorRegistry(), ["base"], [], lambda: SNAPSHOT)
