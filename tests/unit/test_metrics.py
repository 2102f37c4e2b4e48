"""Every metric name, and what moves it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from emo_serve import metrics as metrics_module
from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot, register_gauges
from emo_serve.residency.ports import LoadReport


def pool(
    name: str, resident: bool, running: int, waiting: int = 0, pinned: bool = False
) -> PoolSnapshot:
    return PoolSnapshot(
        name,
        is_resident=resident,
        is_pinned=pinned,
        running_requests=running,
        waiting_requests=waiting,
    )


SNAPSHOT = MetricsSnapshot(
    pools=(
        pool("base", False, 0),
        pool("math", True, 2, pinned=True),
        pool("law", False, 0, waiting=5),
        pool("code+math", True, 3),
        pool("law+math", False, 1, waiting=2),
        pool("math@8", True, 1, waiting=1),
        pool("gone@8", True, 1),
        pool("law", True, 4),  # an old definition, still in use
    ),
    slots=64,
    slots_in_use=12,
    slots_free=52,
    slots_leased=8,
    slot_bytes=100,
)
NAMES = {
    "emo_serve_requests",
    "emo_serve_prompt_tokens",
    "emo_serve_generation_tokens",
    "emo_serve_refused_requests",
    "emo_serve_request_coverage",
    "emo_serve_request_experts",
    "emo_serve_auto_choices",
    "emo_serve_auto_seconds",
    "emo_serve_running_requests",
    "emo_serve_waiting_requests",
    "emo_serve_waiting_seconds",
    "emo_serve_slots",
    "emo_serve_slots_in_use",
    "emo_serve_slots_free",
    "emo_serve_slots_leased",
    "emo_serve_slab_bytes",
    "emo_serve_resident_bytes",
    "emo_serve_step_age_seconds",
    "emo_serve_event_loop_lag_seconds",
    "emo_serve_pool_resident",
    "emo_serve_pool_pinned",
    "emo_serve_pool_hits",
    "emo_serve_pool_misses",
    "emo_serve_smaller_requests",
    "emo_serve_pool_loads",
    "emo_serve_pool_load_seconds",
    "emo_serve_pool_load_bytes",
    "emo_serve_file_read_bytes",
    "emo_serve_expert_reads",
    "emo_serve_streamed_experts",
    "emo_serve_stream_seconds",
    "emo_serve_pool_evictions",
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PoolMetrics:
    register_gauges(registry, lambda: SNAPSHOT, lambda: 2.5)
    return PoolMetrics(registry, ["base", "math"], ["unknown_pool"])


LOAD = LoadReport(
    num_experts=8, experts_copied=3, host_hits=2, bytes_copied=300, bytes_read=100, seconds=0.2
)


def shown(registry: CollectorRegistry, label: str) -> set[str]:
    """Return the samples that carry a pool's label."""
    return {
        sample.name
        for family in registry.collect()
        for sample in family.samples
        if sample.labels.get("pool") == label
    }


def test_everything_is_shown_before_the_first_request(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    families = list(registry.collect())
    assert {family.name for family in families} == NAMES
    assert all(family.samples for family in families)
    for name in ("base", "math", "(union)"):
        labels = {"pool": name, "outcome": "finished"}
        assert registry.get_sample_value("emo_serve_requests_total", labels) == 0


def test_the_module_lists_every_name_with_its_labels(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    listed = {}
    for name, labels in re.findall(
        r"^    (emo_serve_\w+)(?:\{(.*?)\})?", metrics_module.__doc__ or "", re.M
    ):
        listed[name] = set(labels.split(",")) - {""}
    real = {}
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        real[name] = {label for s in family.samples for label in s.labels} - {"le"}
    assert listed == real


def test_counters_count(registry: CollectorRegistry, metrics: PoolMetrics) -> None:
    metrics.count_request("math", "finished")
    metrics.count_request("code+math", "aborted")
    metrics.count_tokens("math", prompt_tokens=7, generation_tokens=3)
    metrics.count_refusal("unknown_pool")
    for share in (0.4, 0.88, 1.0):
        metrics.observe_coverage("math", share)
    metrics.observe_coverage("code+math", 0.97)
    metrics.count_auto("math", 0.004)
    metrics.count_auto("math", 0.04)
    metrics.count_ask("math", is_hit=True)
    metrics.count_ask("a+b", is_hit=False)
    metrics.count_smaller("math")
    metrics.count_wait("math", "granted", 0.3)
    metrics.count_load("math", LOAD)
    metrics.count_load("a+b", replace(LOAD, seconds=3.0))
    metrics.count_failed_load("base")
    metrics.count_streamed(3, 0.5)
    metrics.count_streamed(2, 0.25)
    metrics.count_eviction("math", "room")
    for name, labels, value in (
        ("requests_total", {"pool": "math", "outcome": "finished"}, 1),
        ("requests_total", {"pool": "(union)", "outcome": "aborted"}, 1),
        ("prompt_tokens_total", {"pool": "math"}, 7),
        ("generation_tokens_total", {"pool": "math"}, 3),
        ("refused_requests_total", {"reason": "unknown_pool"}, 1),
        ("request_coverage_count", {"pool": "math"}, 3),
        ("request_coverage_bucket", {"pool": "math", "le": "0.85"}, 1),
        ("request_coverage_bucket", {"pool": "math", "le": "0.9"}, 2),
        ("request_coverage_bucket", {"pool": "math", "le": "1.0"}, 3),
        ("request_coverage_count", {"pool": "base"}, 0),
        ("request_coverage_count", {"pool": "(union)"}, 1),
        ("auto_choices_total", {"pool": "math"}, 2),
        ("auto_choices_total", {"pool": "base"}, 0),
        ("auto_seconds_count", {}, 2),
        ("auto_seconds_bucket", {"le": "0.005"}, 1),
        ("auto_seconds_bucket", {"le": "0.05"}, 2),
        ("pool_hits_total", {"pool": "math"}, 1),
        ("pool_misses_total", {"pool": "math"}, 0),
        ("pool_misses_total", {"pool": "(union)"}, 1),
        ("smaller_requests_total", {"pool": "math"}, 1),
        ("smaller_requests_total", {"pool": "base"}, 0),
        ("waiting_seconds_count", {"outcome": "granted"}, 1),
        ("waiting_seconds_count", {"outcome": "deadline"}, 0),
        ("waiting_seconds_bucket", {"outcome": "granted", "le": "0.5"}, 1),
        ("waiting_seconds_bucket", {"outcome": "granted", "le": "0.25"}, 0),
        ("pool_loads_total", {"pool": "math", "outcome": "loaded"}, 1),
        ("pool_loads_total", {"pool": "math", "outcome": "failed"}, 0),
        ("pool_loads_total", {"pool": "(union)", "outcome": "loaded"}, 1),
        ("pool_loads_total", {"pool": "base", "outcome": "loaded"}, 0),
        ("pool_loads_total", {"pool": "base", "outcome": "failed"}, 1),
        ("pool_load_seconds_count", {}, 2),
        ("pool_load_seconds_sum", {}, 3.2),
        ("pool_load_bytes_total", {}, 600),
        ("file_read_bytes_total", {}, 200),
        ("expert_reads_total", {"tier": "slab"}, 10),
        ("expert_reads_total", {"tier": "host"}, 4),
        ("expert_reads_total", {"tier": "disk"}, 2),
        ("streamed_experts_total", {}, 5),
        ("stream_seconds_total", {}, 0.75),
        ("pool_evictions_total", {"pool": "math", "reason": "room"}, 1),
        ("pool_evictions_total", {"pool": "math", "reason": "operator"}, 0),
    ):
        assert registry.get_sample_value(f"emo_serve_{name}", labels) == value, (name, labels)


def test_a_word_that_is_no_outcome_is_a_bug(metrics: PoolMetrics) -> None:
    for count in (
        lambda: metrics.count_request("math", "done"),
        lambda: metrics.count_wait("math", "done", 1.0),
        lambda: metrics.count_eviction("math", "done"),
    ):
        with pytest.raises(AssertionError):
            count()


def test_gauges_are_the_snapshot_and_unions_share_a_label(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    for name, labels, value in (
        ("running_requests", {"pool": "math"}, 2 + 1),
        ("running_requests", {"pool": "gone"}, 1),
        ("running_requests", {"pool": "math@8"}, None),
        ("running_requests", {"pool": "law"}, 4),
        ("running_requests", {"pool": "(union)"}, 4),
        ("waiting_requests", {"pool": "math"}, 1),
        ("waiting_requests", {"pool": "law"}, 5),
        ("waiting_requests", {"pool": "(union)"}, 2),
        ("pool_resident", {"pool": "math"}, 1),
        ("pool_resident", {"pool": "base"}, 0),
        ("pool_resident", {"pool": "law"}, 0),
        ("pool_resident", {"pool": "(union)"}, None),
        ("pool_resident", {"pool": "gone"}, None),
        ("pool_pinned", {"pool": "math"}, 1),
        ("pool_pinned", {"pool": "law"}, 0),
        ("slots", {}, 64),
        ("slots_in_use", {}, 12),
        ("slots_free", {}, 52),
        ("slots_leased", {}, 8),
        ("slab_bytes", {}, 6400),
        ("resident_bytes", {}, 1200),
        ("step_age_seconds", {}, 2.5),
    ):
        assert registry.get_sample_value(f"emo_serve_{name}", labels) == value, (name, labels)


def test_sizes_count_under_their_pool_and_their_coverage_apart(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    """However many sizes clients ask for, no series is added."""
    before = len(generate_latest(registry).splitlines())
    for size in range(1, 100):
        name = f"math@{size}"
        metrics.count_request(name, "finished")
        metrics.observe_experts(name, size)
        metrics.observe_coverage(name, 0.3)
        metrics.count_ask(name, is_hit=True)
        metrics.count_load(name, LOAD)
        metrics.count_eviction(name, "room")
    metrics.observe_experts("code@4+math@8", 10.5)
    metrics.observe_coverage("code@4+math@8", 0.3)
    metrics.count_request("gone@8", "finished")
    assert len(generate_latest(registry).splitlines()) - before <= 30, "(removed) alone is new"
    for name, labels, value in (
        ("requests_total", {"pool": "math", "outcome": "finished"}, 99),
        ("requests_total", {"pool": "(removed)", "outcome": "finished"}, 1),
        ("request_experts_count", {"pool": "math"}, 99),
        ("request_experts_bucket", {"pool": "math", "le": "8.0"}, 8),
        ("request_experts_bucket", {"pool": "math", "le": "128.0"}, 99),
        ("request_experts_sum", {"pool": "(union)"}, 10.5),
        ("request_coverage_count", {"pool": "math"}, 0),
        ("request_coverage_count", {"pool": "(sized)"}, 99),
        ("request_coverage_count", {"pool": "(union)"}, 1),
        ("pool_hits_total", {"pool": "math"}, 99),
        ("pool_loads_total", {"pool": "math", "outcome": "loaded"}, 99),
        ("pool_evictions_total", {"pool": "math", "reason": "room"}, 99),
    ):
        assert registry.get_sample_value(f"emo_serve_{name}", labels) == value, (name, labels)
    metrics.remove_pool("math")
    labels = {"pool": "(sized)"}
    assert registry.get_sample_value("emo_serve_request_coverage_count", labels) == 99


# -- pools that come and go --


def test_an_added_pool_is_shown_at_once_and_adding_again_keeps_its_counts(
    registry: CollectorRegistry, metrics: PoolMetrics
) -> None:
    metrics.add_pool("law")
    assert shown(registry, "law") >= shown(registry, "math")
    labels = {"pool": "law", "outcome": "finished"}
    assert registry.get_sample_value("emo_serve_requests_total", labels) == 0
    metrics.count_request("law", "finished")
    metrics.add_pool("law")
    assert registry.get_sample_value("emo_serve_requests_total", labels) == 1


def test_a_removed_pool_disappears_and_requests_still_finishing_in_it_are_counted(
    registry: CollectorRegistry,
) -> None:
    empty = MetricsSnapshot((), 0, 0, 0, 0, 0)
    metrics = PoolMetrics(registry, ["base", "math"], [])
    register_gauges(registry, lambda: empty, lambda: 0.0)
    metrics.count_request("math", "finished")
    metrics.remove_pool("math")
    metrics.remove_pool("math")
    assert shown(registry, "math") == set()
    assert shown(registry, "(removed)") == set()
    metrics.count_request("math", "finished")
    metrics.count_eviction("math", "retired")
    metrics.observe_coverage("math", 0.5)
    assert shown(registry, "math") == set()
    labels = {"pool": "(removed)", "outcome": "finished"}
    assert registry.get_sample_value("emo_serve_requests_total", labels) == 1
    metrics.add_pool("math")
    labels = {"pool": "math", "outcome": "finished"}
    assert registry.get_sample_value("emo_serve_requests_total", labels) == 0


def test_unions_stay_whatever_is_removed(registry: CollectorRegistry, metrics: PoolMetrics) -> None:
    metrics.remove_pool("code+math")
    metrics.count_request("code+math", "finished")
    labels = {"pool": "(union)", "outcome": "finished"}
    assert registry.get_sample_value("emo_serve_requests_total", labels) == 1


def test_no_series_is_shown_twice(registry: CollectorRegistry, metrics: PoolMetrics) -> None:
    for name in ("law", "code+math"):
        metrics.add_pool(name)
    lines = [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
    series = [line.rpartition(" ")[0] for line in lines]
    assert len(series) == len(set(series))


def test_the_registry_is_the_callers() -> None:
    for _ in range(2):
        registry = CollectorRegistry()
        PoolMetrics(registry, ["base"], [])
        register_gauges(registry, lambda: SNAPSHOT, lambda: 2.5)
