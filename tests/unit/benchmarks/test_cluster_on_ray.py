"""The parts of the benchmarks on real replicas that need none: traces, figures, matched times."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.cluster.faults import delays, ended_at
from benchmarks.cluster.on_ray import Account
from benchmarks.cluster.replicas import figures_of, zipf_pools


def test_a_trace_is_zipf_and_its_seed_says_what_is_popular() -> None:
    first, second = (zipf_pools(4000, seed) for seed in (1, 2))
    assert zipf_pools(4000, 1) == first
    ranked = [count for _, count in Counter(first).most_common()]
    assert len(ranked) == 10
    assert 1.7 < ranked[0] / ranked[1] < 2.3
    assert Counter(first).most_common(1)[0][0] != Counter(second).most_common(1)[0][0]


def test_figures_are_those_of_all_replicas() -> None:
    before = [Account(5, 5, 1), Account(0, 0, 0)]
    after = [Account(35, 15, 5), Account(8, 12, 6)]
    done = [now.since(then) for now, then in zip(after, before, strict=True)]
    figures = figures_of(done, [0.01] * 50 + [0.2] * 10)
    assert (figures["requests"], figures["loads"]) == (60, 10)
    assert (figures["hit_rate"], figures["imbalance"]) == (0.633, 1.33)
    assert (figures["ttft_p50_ms"], figures["ttft_p95_ms"]) == (10, 200)


def test_an_end_belongs_to_the_client_that_left_last_before_it() -> None:
    found = delays([10.0, 20.0, 30.0], [3.0, 10.1, 20.3])
    assert [None if one is None else round(one, 3) for one in found] == [0.1, 0.3, None]


def test_only_requests_whose_clients_left_count(tmp_path: Path) -> None:
    line = {"at_seconds": 5.0, "wait_seconds": 0.5, "service_seconds": 1.0, "outcome": "aborted"}
    other = json.dumps({**line, "outcome": "finished"})
    for name in ("log-a.jsonl", "log-b.jsonl"):
        (tmp_path / name).write_text(f"{json.dumps(line)}\n{other}\n")
    assert ended_at(tmp_path) == [6.5, 6.5]
