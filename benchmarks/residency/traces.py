"""What residency is simulated on: sets of pools, and traces of requests for them.

Pools are the shipped demo's, with the overlap that calibration gave them, or made up at the
released model's geometry. There each pool takes the highest of `general + topic + own` random
scores in each layer, where `general` is common to all pools and `topic` to the pools of one topic.
The weights were set so that pools of 32 overlap about as much as the demo's do.

A trace is Zipf, optionally with a drift and in sessions, or what a server's `--request-log`
recorded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean

from emo_serve import demo
from emo_serve.names import BASE_POOL, canonical_name
from emo_serve.pools.derived import derive
from emo_serve.pools.pool import ExpertPool, LayerExperts

__all__ = [
    "THINK_SECONDS",
    "Arrival",
    "PoolSet",
    "demo_pools",
    "mean_overlap",
    "read_trace",
    "released_pools",
    "zipf_trace",
]

_BYTES_PER_WEIGHT = 2  # bf16
_TOPICS = 6
THINK_SECONDS = 10.0


@dataclass(frozen=True)
class PoolSet:
    """Pools of one model, by name, and the sizes that residency needs."""

    name: str
    pools: dict[str, ExpertPool]
    experts_per_layer: tuple[int, ...]
    slot_bytes: int

    def knowing(self, names: Iterable[str]) -> PoolSet:
        """Return the set plus the base pool, sizes and unions that these names include."""
        pools = dict(self.pools)
        for name in set(names) - pools.keys():
            if name == BASE_POOL:
                layers = (tuple(range(count)) for count in self.experts_per_layer)
                experts = tuple(LayerExperts(ids) if ids else None for ids in layers)
                pools[name] = ExpertPool(name, experts)
            else:
                pools[name] = derive(canonical_name(name), self.pools, None)
        return replace(self, pools=pools)


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, for which pool, and how long it then holds its lease."""

    at_seconds: float
    pool: str
    service_seconds: float


def demo_pools() -> PoolSet:
    """Read the ten pools that ship."""
    from emo_serve.emo.config import load_config
    from emo_serve.pools.catalog import PoolCatalog

    config = load_config(demo.model_dir())
    catalog = PoolCatalog.read(demo.pools_dir(), config.moe_layers, None)
    experts = config.facts.experts_per_layer
    weights = 3 * config.hidden_size * config.intermediate_size
    return PoolSet("demo", dict(catalog.pools), experts, weights * _BYTES_PER_WEIGHT)


def released_pools(count: int = 24, layers: int = 16, seed: int = 1) -> PoolSet:
    """Make up pools of 16 experts, and every third of 32, of 128; the last expert is shared."""
    rng = random.Random(seed)
    num_experts = 128
    pools: dict[str, list[LayerExperts]] = {f"pool-{n:02}": [] for n in range(count)}
    for _ in range(layers):
        general = [rng.gauss(0, 1) for _ in range(num_experts)]
        topics = [[rng.gauss(0, 1) for _ in range(num_experts)] for _ in range(_TOPICS)]
        for number, chosen in enumerate(pools.values()):
            topic = topics[number % _TOPICS]
            score = [
                0.6 * g + 0.8 * t + rng.gauss(0, 1) for g, t in zip(general, topic, strict=True)
            ]
            size = 32 if number % 3 == 2 else 16
            ranked = sorted(range(num_experts - 1), key=lambda e: -score[e])
            chosen.append(LayerExperts((*ranked[: size - 1], num_experts - 1)))
    named = {name: ExpertPool(name, tuple(chosen)) for name, chosen in pools.items()}
    slot_bytes = 3 * 2048 * 1024 * _BYTES_PER_WEIGHT
    return PoolSet("released", named, (num_experts,) * layers, slot_bytes)


def mean_overlap(pools: Sequence[ExpertPool]) -> float:
    """Return shared experts over experts of either, as a mean over pairs of pools and layers."""
    return mean(
        len(set(a) & set(b)) / len(set(a) | set(b))
        for one, other in combinations(pools, 2)
        for a, b in zip(one.expert_ids, other.expert_ids, strict=True)
        if a
    )


def zipf_trace(
    names: Sequence[str],
    *,
    count: int,
    rate: float,
    service_seconds: float,
    exponent: float,
    drift_seconds: float | None,
    session_requests: int,
    seed: int,
) -> list[Arrival]:
    """Draw requests; the pool of rank r has weight r ** -exponent, services are exponential.

    With a drift a random pool of the less popular half takes the first rank now and then. With
    `session_requests` of 1 arrivals are Poisson; with more they come in sessions of so many on
    average, all for one pool, with pauses of THINK_SECONDS on average between them.
    """
    rng = random.Random(seed)
    ranking = list(names)
    rng.shuffle(ranking)
    weights = [(rank + 1) ** -exponent for rank in range(len(ranking))]
    now, drifts = 0.0, 0
    trace: list[Arrival] = []
    while now * rate < count:
        now += rng.expovariate(rate / session_requests)
        while drift_seconds is not None and now >= (drifts + 1) * drift_seconds:
            drifts += 1
            ranking.insert(0, ranking.pop(rng.randrange(len(ranking) // 2, len(ranking))))
        (pool,) = rng.choices(ranking, weights)
        at = now
        while True:
            trace.append(Arrival(at, pool, rng.expovariate(1 / service_seconds)))
            if rng.random() >= 1 - 1 / session_requests:
                break
            at += rng.expovariate(1 / THINK_SECONDS)
    return sorted(trace, key=lambda arrival: arrival.at_seconds)


def read_trace(path: Path) -> list[Arrival]:
    """Read a server's request log; its first request comes at second 0."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = sorted(map(json.loads, lines), key=lambda record: record["at_seconds"])
    return [
        Arrival(
            record["at_seconds"] - records[0]["at_seconds"],
            record["pool"],
            record["service_seconds"],
        )
        for record in records
    ]
