"""Every Prometheus metric of emo-serve, with its help and unit; shown beside vLLM's on /metrics.

Counters and histograms are fed by explicit calls. Gauges are never set: a collector takes a frozen
snapshot at each scrape, so that an idle server shows every pool and no gauge drifts. With
PROMETHEUS_MULTIPROC_DIR, counters are in the files of that directory, which /metrics then shows
alone; gauges are not, so they are in no registry there and are added to the answer.

Requests
    emo_serve_requests_total{pool,outcome}       engine requests: finished, aborted or failed
    emo_serve_prompt_tokens_total{pool}          prompt tokens of requests that began to answer
    emo_serve_generation_tokens_total{pool}      tokens generated
    emo_serve_refused_requests_total{reason}     requests refused before generation
    emo_serve_request_coverage{pool}             histogram: share of the full router's mass inside
                                                 the pool, mean over an engine request's tokens
                                                 and MoE layers; low: wrong pool for that text
    emo_serve_request_experts{pool}              histogram: experts per layer of the pool that an
                                                 engine request was served in: the sizes asked for
    emo_serve_auto_choices_total{pool}           requests for model `auto`, by the pool chosen
    emo_serve_auto_seconds                       histogram: how long those choices took
    emo_serve_running_requests{pool}             engine requests that hold the pool
    emo_serve_waiting_requests{pool}             requests waiting for the pool to be loaded
    emo_serve_waiting_seconds{outcome}           histogram: how long requests waited, and what
                                                 ended it: granted, deadline, failed or left
Residency
    emo_serve_slots                              expert slots in all layers
    emo_serve_slots_in_use                       those that hold or are receiving an expert
    emo_serve_slots_free                         those that hold none
    emo_serve_slots_leased                       slots that running requests keep in place
    emo_serve_slab_bytes                         device memory of all slots, on all ranks
    emo_serve_resident_bytes                     device memory of the slots in use
    emo_serve_pool_resident{pool}                1 when all experts of the pool are in slots
    emo_serve_pool_pinned{pool}                  1 when an operator has pinned the pool
Loads
    emo_serve_pool_hits_total{pool}              requests that found their pool resident
    emo_serve_pool_misses_total{pool}            requests that did not
    emo_serve_smaller_requests_total{pool}       requests served in a smaller size, since the pool
                                                 was not resident (--elastic-min-experts); each is
                                                 also a hit or a miss of that size
    emo_serve_pool_loads_total{pool,outcome}     loads that ended: loaded or failed
    emo_serve_pool_load_seconds                  histogram: from a load's start to its publication
    emo_serve_pool_load_bytes_total              bytes copied into slots, on all ranks
    emo_serve_file_read_bytes_total              bytes read from checkpoint files, on all ranks
    emo_serve_expert_reads_total{tier}           experts that loads needed, by where they were
                                                 found: slab (nothing to copy), host or disk
    emo_serve_streamed_experts_total             experts read in the middle of a step, for pools
                                                 that are too large for the slots
    emo_serve_stream_seconds_total               time that steps waited for them
    emo_serve_pool_evictions_total{pool,reason}  pools that gave up their slots: to make room, or
                                                 shrunk for that to a size that stays, by the
                                                 operator, or retired (the definition is gone)
Server
    emo_serve_step_age_seconds                   time since the engine's last step, or since work
                                                 came to it; 0 while it has none
    emo_serve_event_loop_lag_seconds             histogram: how late the front end's event loop
                                                 was, ten times per second

A pool added at run time is shown at once, with zeros; one that is removed disappears, except from
such files, where nothing can be removed. All unions share the label `(union)`: clients, not the
operator, decide how many there are. A size, such as `math@8`, counts under its pool; only coverage,
which falls with the size, is kept apart under `(sized)`. Requests still finishing in a removed pool
count as `(removed)`. What the server asks for itself is no request in any of these: only what it
holds, loads and evicts is shown, under `(build)` while it builds a pool, and under `(auto)` while
it asks the router for `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from emo_serve.names import is_sized, is_union, split_size
from emo_serve.residency.ports import LoadReport

__all__ = [
    "AUTO_PROBE_POOL",
    "BUILD_POOL",
    "EVICTION_REASONS",
    "LOAD_OUTCOMES",
    "OUTCOMES",
    "TIERS",
    "WAIT_OUTCOMES",
    "MetricsSnapshot",
    "PoolMetrics",
    "PoolSnapshot",
    "gauges",
    "pool_label",
    "register_gauges",
]

OUTCOMES = ("finished", "aborted", "failed")
WAIT_OUTCOMES = ("granted", "deadline", "failed", "left")
LOAD_OUTCOMES = ("loaded", "failed")
EVICTION_REASONS = ("room", "shrunk", "operator", "retired")
TIERS = ("slab", "host", "disk")

AUTO_PROBE_POOL = "(auto)"
BUILD_POOL = "(build)"
"""The names of the server's own temporary pools; clients cannot use them."""

_UNION_LABEL = "(union)"
_SIZED_LABEL = "(sized)"
_REMOVED_LABEL = "(removed)"
# From a copy within host memory to the default deadline; steps of 1-2.5-5 bound a quantile's error.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0),
)
_SHARES = tuple(count / 20 for count in range(1, 21))
_EXPERTS = tuple(2**power for power in range(11))  # up to 1024 per layer


@dataclass(frozen=True)
class PoolSnapshot:
    """One pool at one moment."""

    name: str
    is_resident: bool
    is_pinned: bool
    running_requests: int
    waiting_requests: int


@dataclass(frozen=True)
class MetricsSnapshot:
    """Everything the gauges show; `slot_bytes` is one expert in one layer, over all ranks.

    A name occurs again for an old definition with running requests: requests are summed, and the
    first entry says whether the pool is resident and pinned.
    """

    pools: tuple[PoolSnapshot, ...]
    slots: int
    slots_in_use: int
    slots_free: int
    slots_leased: int
    slot_bytes: int


def pool_label(name: str) -> str:
    """Return the label value of a pool: a size has its pool's, and every union has the same."""
    return _UNION_LABEL if is_union(name) else split_size(name)[0]


class PoolMetrics:
    """Hold the counters and register the gauges; one object per registry.

    It is also the residency manager's `ResidencyObserver`.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        pools: Iterable[str],
        refusal_reasons: Iterable[str],
    ) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"emo_serve_{name}", help_text, labels, registry=registry)

        def seconds(name: str, help_text: str, *labels: str) -> Histogram:
            name = f"emo_serve_{name}_seconds"
            return Histogram(name, help_text, labels, registry=registry, buckets=_SECONDS)

        self._requests = counter("requests", "Engine requests", "pool", "outcome")
        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of requests that began to answer", "pool"
        )
        self._generation_tokens = counter("generation_tokens", "Tokens generated", "pool")
        self._refused = counter("refused_requests", "Requests refused before generation", "reason")
        self._coverage = Histogram(
            "emo_serve_request_coverage",
            "Share of the full router's mass inside a request's pool",
            ("pool",),
            registry=registry,
            buckets=_SHARES,
        )
        self._request_experts = Histogram(
            "emo_serve_request_experts",
            "Experts per layer of the pool that a request was served in",
            ("pool",),
            registry=registry,
            buckets=_EXPERTS,
        )
        self._choices = counter("auto_choices", "Requests for auto, by the pool chosen", "pool")
        self._choice_seconds = seconds("auto", "Time to choose a pool for auto")
        self._waits = seconds("waiting", "Time requests waited for a pool to be loaded", "outcome")
        self._hits = counter("pool_hits", "Requests that found their pool resident", "pool")
        self._misses = counter("pool_misses", "Requests whose pool was not resident", "pool")
        self._smaller = counter(
            "smaller_requests", "Requests served in a smaller size than asked for", "pool"
        )
        self._loads = counter("pool_loads", "Loads of pools that ended", "pool", "outcome")
        self._load_seconds = seconds("pool_load", "Time from a load's start to its publication")
        self._copied = counter("pool_load_bytes", "Bytes copied into expert slots, on all ranks")
        self._read = counter("file_read_bytes", "Bytes read from checkpoint files, on all ranks")
        self._experts = counter(
            "expert_reads", "Experts that loads needed, by where they were found", "tier"
        )
        self._streamed = counter(
            "streamed_experts", "Experts read in the middle of a step, for pools that do not fit"
        )
        self._stream_seconds = counter(
            "stream_seconds", "Time that steps waited for experts of pools that do not fit"
        )
        self._evictions = counter(
            "pool_evictions", "Pools that gave up their slots", "pool", "reason"
        )
        self._lag = seconds("event_loop_lag", "How late the front end's event loop was")
        self._by_pool: tuple[tuple[Counter | Histogram, tuple[str, ...]], ...] = (
            (self._requests, OUTCOMES),
            (self._loads, LOAD_OUTCOMES),
            (self._evictions, EVICTION_REASONS),
            *((c, ()) for c in (self._prompt_tokens, self._generation_tokens)),
            *((c, ()) for c in (self._hits, self._misses, self._smaller)),
            (self._coverage, ()),
            (self._request_experts, ()),
            (self._choices, ()),
        )
        self._known: set[str] = set()
        for pool in (*pools, _UNION_LABEL, BUILD_POOL, AUTO_PROBE_POOL):
            self.add_pool(pool)
        self._coverage.labels(_SIZED_LABEL)
        for reason in refusal_reasons:
            self._refused.labels(reason)
        for outcome in WAIT_OUTCOMES:
            self._waits.labels(outcome)
        for tier in TIERS:
            self._experts.labels(tier)

    # -- which pools there are --

    def add_pool(self, name: str) -> None:
        """Show a pool's series, at zero; a no-op if they are shown already."""
        label = pool_label(name)
        self._known.add(label)
        for family, values in self._by_pool:
            for child in ((label, value) for value in values) if values else ((label,),):
                family.labels(*child)

    def remove_pool(self, name: str) -> None:
        """Stop showing a pool's series; a no-op for unions and pools that are not shown."""
        label = pool_label(name)
        if label == _UNION_LABEL or label not in self._known:
            return
        self._known.remove(label)
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # prometheus_client would only warn
            return
        for family, values in self._by_pool:
            for child in ((label, value) for value in values) if values else ((label,),):
                family.remove(*child)

    def _label(self, pool: str) -> str:
        label = pool_label(pool)
        return label if label in self._known else _REMOVED_LABEL

    # -- requests --

    def count_request(self, pool: str, outcome: str) -> None:
        """Count an engine request that ended; `outcome` is one of OUTCOMES."""
        assert outcome in OUTCOMES, outcome
        self._requests.labels(self._label(pool), outcome).inc()

    def count_tokens(self, pool: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of one engine request."""
        self._prompt_tokens.labels(self._label(pool)).inc(prompt_tokens)
        self._generation_tokens.labels(self._label(pool)).inc(generation_tokens)

    def observe_experts(self, pool: str, experts_per_layer: float) -> None:
        """Add the size of the pool that one engine request was served in."""
        self._request_experts.labels(self._label(pool)).observe(experts_per_layer)

    def observe_coverage(self, pool: str, share: float) -> None:
        """Add one engine request's coverage, from 0 to 1."""
        label = _SIZED_LABEL if is_sized(pool) else self._label(pool)
        self._coverage.labels(label).observe(share)

    def count_refusal(self, reason: str) -> None:
        """Count a request refused before generation."""
        self._refused.labels(reason).inc()

    def count_auto(self, pool: str, seconds: float) -> None:
        """Count a request for `auto`: the pool chosen, and how long that took."""
        self._choices.labels(self._label(pool)).inc()
        self._choice_seconds.observe(seconds)

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Count a request for a pool that was resident, or was not."""
        (self._hits if is_hit else self._misses).labels(self._label(pool)).inc()

    def count_smaller(self, pool: str) -> None:
        """Count a request that a smaller size serves, since its pool was not resident."""
        self._smaller.labels(self._label(pool)).inc()

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Count a request whose wait for a load has ended; `outcome` is one of WAIT_OUTCOMES."""
        assert outcome in WAIT_OUTCOMES, outcome
        self._waits.labels(outcome).observe(seconds)

    def observe_lag(self, seconds: float) -> None:
        """Add by how much the front end's event loop was late."""
        self._lag.observe(seconds)

    # -- loads --

    def count_load(self, pool: str, report: LoadReport) -> None:
        """Count a load that copied experts and published its pool."""
        self._loads.labels(self._label(pool), "loaded").inc()
        self._load_seconds.observe(report.seconds)
        found = (report.slab_hits, report.host_hits, report.disk_reads)
        for tier, count in zip(TIERS, found, strict=True):
            self._experts.labels(tier).inc(count)
        self._copied.inc(report.bytes_copied)
        self._read.inc(report.bytes_read)

    def count_streamed(self, experts: int, seconds: float) -> None:
        """Count experts that were read in the middle of a step, and the time that took."""
        self._streamed.inc(experts)
        self._stream_seconds.inc(seconds)

    def count_failed_load(self, pool: str) -> None:
        """Count a load that failed; only the number of such loads is known."""
        self._loads.labels(self._label(pool), "failed").inc()

    def count_eviction(self, pool: str, reason: str) -> None:
        """Count a pool that gave up its slots; `reason` is one of EVICTION_REASONS."""
        assert reason in EVICTION_REASONS, reason
        self._evictions.labels(self._label(pool), reason).inc()


# -- gauges --


def register_gauges(
    registry: CollectorRegistry,
    snapshot: Callable[[], MetricsSnapshot],
    step_age_seconds: Callable[[], float],
) -> None:
    """Show the gauges, which are asked for at each scrape."""
    registry.register(_GaugeCollector(snapshot, step_age_seconds))


class _GaugeCollector(Collector):
    """Turn one snapshot into gauges at each scrape."""

    def __init__(
        self, snapshot: Callable[[], MetricsSnapshot], step_age_seconds: Callable[[], float]
    ) -> None:
        self._snapshot, self._step_age_seconds = snapshot, step_age_seconds

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the gauges without a snapshot, because there is none at registration."""
        yield from gauges(MetricsSnapshot((), 0, 0, 0, 0, 0), 0.0)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges as they are now."""
        yield from gauges(self._snapshot(), self._step_age_seconds())


def gauges(snapshot: MetricsSnapshot, step_age_seconds: float) -> Iterator[GaugeMetricFamily]:
    """Yield the gauges of one moment; they are made as they are asked for, in any thread."""
    running, waiting = {_UNION_LABEL: 0}, {_UNION_LABEL: 0}
    resident: dict[str, int] = {}
    pinned: dict[str, int] = {}
    for pool in snapshot.pools:
        label = pool_label(pool.name)
        running[label] = running.get(label, 0) + pool.running_requests
        waiting[label] = waiting.get(label, 0) + pool.waiting_requests
        if label == pool.name:  # neither a union nor a size
            resident.setdefault(label, pool.is_resident)
            pinned.setdefault(label, pool.is_pinned)
    yield _by_pool("running_requests", "Engine requests that hold the pool", running)
    yield _by_pool("waiting_requests", "Requests waiting for the pool to be loaded", waiting)
    yield _by_pool("pool_resident", "1 when all experts of the pool are in slots", resident)
    yield _by_pool("pool_pinned", "1 when an operator has pinned the pool", pinned)
    size = snapshot.slot_bytes
    for name, help_text, value in (
        ("slots", "Expert slots in all layers", snapshot.slots),
        ("slots_in_use", "Slots that hold or are receiving an expert", snapshot.slots_in_use),
        ("slots_free", "Slots that hold no expert", snapshot.slots_free),
        ("slots_leased", "Slots that running requests keep in place", snapshot.slots_leased),
        ("slab_bytes", "Device memory of all slots, on all ranks", snapshot.slots * size),
        ("resident_bytes", "Device memory of the slots in use", snapshot.slots_in_use * size),
        ("step_age_seconds", "Time since the last step; 0 without work", step_age_seconds),
    ):
        yield GaugeMetricFamily(f"emo_serve_{name}", help_text, value=value)


def _by_pool(name: str, help_text: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"emo_serve_{name}", help_text, labels=["pool"])
    for label, value in values.items():
        family.add_metric([label], float(value))
    return family
