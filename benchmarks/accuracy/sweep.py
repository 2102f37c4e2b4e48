"""Speed of a model in pools against the number of clients: where is the sweet spot?

The clients are those of `serving/throughput.py`: streamed greedy completions, prompts mixed over
the domains' own texts, each in its domain's pool. Rounds go over all concurrencies in turn, so that
a machine whose speed drifts favours none; the first round warms up. The sweet spot is where tokens
per second divided by the gap between two tokens of a stream is highest: beyond it, clients lose
more by waiting than they gain together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.accuracy.pools import Case, build_pools
from benchmarks.accuracy.servers import pools_served, serve
from benchmarks.accuracy.texts import Domain
from benchmarks.harness.progress import steps
from benchmarks.serving.throughput import Sample, load
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.names import BASE_POOL

__all__ = ["sweep"]

_DOMAINS = 4
_TOKENS = 64  # a request
_REQUESTS = 4  # a client and round


class _Served:
    """What `serving.throughput.load` needs of a server."""

    kind = "emo"

    def __init__(self, url: str, names: dict[str, str], texts: Path) -> None:
        self.url, self.pools = url, list(names)
        self._names, self._texts = names, texts

    def model_of(self, domain: str) -> str:
        return self._names[domain]

    def texts_of(self, domain: str) -> list[str]:
        lines = (self._texts / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]


def sweep(
    domains: Sequence[Domain], flags: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Measure every concurrency and say which is the sweet spot."""
    checkpoint = Checkpoint.open(args.model)
    case = Case("layerwise", args.pool_size)
    pools = {
        domain.name: build_pools(
            checkpoint, domain.name, [text.ids for text in domain.examples], [case]
        )[case]
        for domain in domains[:_DOMAINS]
    }
    samples: dict[int, list[Sample]] = {count: [] for count in args.concurrency}
    loads = []
    with (
        serve(args.model, [*flags, "--pin", BASE_POOL]) as (endpoint, memory),
        pools_served(endpoint, list(pools.values())),
    ):
        names = {domain: pool.name for domain, pool in pools.items()}
        server: Any = _Served(endpoint.url, names, args.texts)
        for round_number in steps(range(args.rounds + 1), "rounds"):
            loads.append(os.getloadavg()[0])
            for count, measured in steps(samples.items(), "loads"):
                sample = asyncio.run(load(server, count, _REQUESTS, _TOKENS))
                if round_number:
                    measured.append(sample)
    rows = [_row(count, measured) for count, measured in samples.items()]
    best = max(rows, key=lambda row: row["tokens_per_second"] / row["gap_ms"])
    return {
        "model": args.model.name,
        "dtype": args.dtype,
        "memory": memory,
        "domains": list(pools),
        "speeds": rows,
        "sweet_spot": best["concurrency"],
        "load_average": {"before": loads[0], "highest": max(loads), "lowest": min(loads)},
    }


def _row(concurrency: int, samples: Sequence[Sample]) -> dict[str, Any]:
    rates = [sample.tokens_per_second for sample in samples]
    return {
        "concurrency": concurrency,
        "tokens_per_second": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "ttft_ms": 1e3 * median(sample.ttft_seconds for sample in samples),
        "gap_ms": 1e3 * median(sample.gap_seconds for sample in samples),
    }
