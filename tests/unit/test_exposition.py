"""The text is prometheus_client's, byte for byte, and is made in pieces."""

from __future__ import annotations

import math
import time

import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Summary,
    generate_latest,
)
from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from emo_serve.exposition import Exposition, selected

ODD = ('a"b\\c\nd', "", "plain", "µ")


class _Families(Collector):
    def __init__(self, *families: object) -> None:
        self._families = families

    def collect(self) -> object:
        return self._families


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("vllm:requests", "Counts\nin two lines", ["pool"], registry=registry)
    histogram = Histogram("seconds", "Time", ["pool"], registry=registry, buckets=(0.1, 1, 1e7))
    for place, label in enumerate(ODD):
        counter.labels(label).inc(place * 1e9 + 0.5)
        histogram.labels(label).observe(place)
    for place, number in enumerate((0.0, -0.0, 1e21, math.inf, -math.inf, math.nan, 123456789.0)):
        Gauge(f"gauge_{place}", "A number", registry=registry).set(number)
    Summary("summary", "Sums", registry=registry).observe(2)
    Info("build", "What it is", registry=registry).info({"version": "1"})
    Enum("state", "Which", states=["up", "down"], registry=registry)
    sized = GaugeHistogramMetricFamily("sizes", "h", buckets=[("1", 2), ("+Inf", 3)], gsum_value=9)
    dated = GaugeMetricFamily("dated", "Has times", labels=["x"])
    dated.add_metric(["1"], 2.0, timestamp=1234.5)
    registry.register(_Families(sized, dated))
    return registry


def test_text_is_that_of_prometheus_client_again_and_again(registry: CollectorRegistry) -> None:
    exposition = Exposition()
    for _ in range(3):
        assert exposition.text(registry.collect()) == generate_latest(registry)
        registry._names_to_collectors["vllm:requests"].labels("new").inc()  # type: ignore[attr-defined]


def test_a_help_text_that_changes_is_shown(registry: CollectorRegistry) -> None:
    exposition = Exposition()
    for help_text in ("one", "two"):
        family = GaugeMetricFamily("x", help_text, value=1)
        assert f"# HELP x {help_text}\n".encode() in exposition.text([family])


def test_only_what_the_last_scrape_showed_is_remembered() -> None:
    exposition = Exposition()
    for number in range(100):
        family = GaugeMetricFamily("x", "help", labels=["n"])
        family.add_metric([str(number)], 1.0)
        exposition.text([family])
    assert len(exposition._texts) == 2  # a header and a line


def test_others_get_their_turn_after_every_few_lines() -> None:
    registry = CollectorRegistry()
    for number in range(20):
        counter = Counter(f"c{number}", "help", ["pool"], registry=registry)
        for pool in range(40):
            counter.labels(str(pool))
    pauses: list[float] = []
    exposition = Exposition(pause=lambda: pauses.append(time.perf_counter()))
    lines = exposition.text(registry.collect()).count(b"\n")
    assert lines > 1600
    assert lines / 100 < len(pauses) <= lines / 50


def test_only_the_named_families_are_collected(registry: CollectorRegistry) -> None:
    assert [f.name for f in selected(registry, ["seconds_x", "vllm:requests", "gauge_2"])] == [
        "gauge_2",
        "vllm:requests",
    ]
    (found,) = selected(registry, ["vllm:requests"])
    assert {sample.name for sample in found.samples} == {"vllm:requests_total"}


def test_a_registry_that_cannot_tell_what_it_has_is_read_whole() -> None:
    registry = CollectorRegistry()
    families = [GaugeMetricFamily(name, "help", value=1) for name in ("b", "a", "c")]
    registry.register(_Families(*families))
    assert [family.name for family in selected(registry, ["b", "a", "d"])] == ["a", "b"]
