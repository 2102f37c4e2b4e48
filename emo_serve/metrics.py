"""Every Prometheus name of emo-serve, with its help and unit; shown beside vLLM's on /metrics.

Counters are fed by explicit calls. Gauges are never set: a collector asks for a frozen snapshot
when it is scraped, so that an idle server shows every pool and nothing drifts.

    emo_serve_requests_total{pool,outcome}     engine requests: finished, aborted or failed
    emo_serve_prompt_tokens_total{pool}        prompt tokens of requests that began to answer
    emo_serve_generation_tokens_total{pool}    tokens generated
    emo_serve_refused_requests_total{reason}   requests refused before generation
    emo_serve_running_requests{pool}           engine requests that hold the pool
    emo_serve_pool_resident{pool}              1 when all experts of the pool are in slots
    emo_serve_slots                            expert slots, all layers together
    emo_serve_slots_in_use                     of those, slots that hold an expert

All unions share the label `(union)`: their number is not bounded by the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["OUTCOMES", "MetricsSnapshot", "PoolMetrics", "PoolSnapshot", "pool_label"]

OUTCOMES = ("finished", "aborted", "failed")
_UNION_LABEL = "(union)"


@dataclass(frozen=True)
class PoolSnapshot:
    """One pool at one moment."""

    name: str
    is_resident: bool
    running_requests: int


@dataclass(frozen=True)
class MetricsSnapshot:
    """Everything the gauges show."""

    pools: tuple[PoolSnapshot, ...]
    slots: int
    slots_in_use: int


def pool_label(name: str) -> str:
    """Return the label value of a pool; every union has the same."""
    return _UNION_LABEL if "+" in name else name


class PoolMetrics:
    """Hold the counters and register the gauges; one object a registry."""

    def __init__(
        self,
        registry: CollectorRegistry,
        pools: Iterable[str],
        refusal_reasons: Iterable[str],
        snapshot: Callable[[], MetricsSnapshot],
    ) -> None:
        self._requests = Counter(
            "emo_serve_requests", "Engine requests", ["pool", "outcome"], registry=registry
        )
        self._prompt_tokens = Counter(
            "emo_serve_prompt_tokens",
            "Prompt tokens of requests that began to answer",
            ["pool"],
            registry=registry,
        )
        self._generation_tokens = Counter(
            "emo_serve_generation_tokens", "Tokens generated", ["pool"], registry=registry
        )
        self._refused = Counter(
            "emo_serve_refused_requests",
            "Requests refused before generation",
            ["reason"],
            registry=registry,
        )
        registry.register(_GaugeCollector(snapshot))
        for pool in (*map(pool_label, pools), _UNION_LABEL):
            for outcome in OUTCOMES:
                self._requests.labels(pool, outcome)
            self._prompt_tokens.labels(pool)
            self._generation_tokens.labels(pool)
        for reason in refusal_reasons:
            self._refused.labels(reason)

    def count_request(self, pool: str, outcome: str) -> None:
        """Count an engine request that ended; `outcome` is one of OUTCOMES."""
        assert outcome in OUTCOMES, outcome
        self._requests.labels(pool_label(pool), outcome).inc()

    def count_tokens(self, pool: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of one engine request."""
        self._prompt_tokens.labels(pool_label(pool)).inc(prompt_tokens)
        self._generation_tokens.labels(pool_label(pool)).inc(generation_tokens)

    def count_refusal(self, reason: str) -> None:
        """Count a request refused before generation."""
        self._refused.labels(reason).inc()


class _GaugeCollector(Collector):
    """Turn one snapshot into gauges at each scrape."""

    def __init__(self, snapshot: Callable[[], MetricsSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the gauges without taking a snapshot, which registration must not need."""
        yield from _families()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of this moment."""
        snapshot = self._snapshot()
        running, resident, slots, in_use = _families()
        totals = dict.fromkeys((_UNION_LABEL,), 0)
        for pool in snapshot.pools:
            label = pool_label(pool.name)
            totals[label] = totals.get(label, 0) + pool.running_requests
            if label != _UNION_LABEL:
                resident.add_metric([label], float(pool.is_resident))
        for label, count in totals.items():
            running.add_metric([label], count)
        slots.add_metric([], snapshot.slots)
        in_use.add_metric([], snapshot.slots_in_use)
        yield from (running, resident, slots, in_use)


def _families() -> tuple[GaugeMetricFamily, ...]:
    return (
        GaugeMetricFamily(
            "emo_serve_running_requests", "Engine requests that hold the pool", labels=["pool"]
        ),
        GaugeMetricFamily(
            "emo_serve_pool_resident",
            "1 when all experts of the pool are in slots",
            labels=["pool"],
        ),
        GaugeMetricFamily("emo_serve_slots", "Expert slots, all layers together", labels=[]),
        GaugeMetricFamily("emo_serve_slots_in_use", "Slots that hold an expert", labels=[]),
    )
