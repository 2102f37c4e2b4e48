"""The residency benchmark's own parts: traces, Belady's order, and accounts that add up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.residency.simulation import Belady, Link, quantile, simulate
from benchmarks.residency.traces import (
    Arrival,
    PoolSet,
    demo_pools,
    mean_overlap,
    read_trace,
    released_pools,
    zipf_trace,
)
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.policy import LruPolicy

LINK = Link(overhead_seconds=1.0, bytes_per_second=100.0)


def pool_set(**experts: tuple[int, ...]) -> PoolSet:
    """Return pools of one layer with 12 experts of 50 bytes."""
    pools = {name: ExpertPool(name, (LayerExperts(ids),)) for name, ids in experts.items()}
    return PoolSet("test", pools, (12,), slot_bytes=50)


THREE = pool_set(a=(0, 1), b=(2, 3), c=(4, 5))


def arrivals(text: str, service_seconds: float = 0.0) -> list[Arrival]:
    """Return one request every 10 seconds."""
    return [Arrival(10.0 * i, pool, service_seconds) for i, pool in enumerate(text)]


def test_a_miss_waits_for_its_load_and_a_hit_for_nothing() -> None:
    outcome = simulate(arrivals("aab"), THREE, 4, LINK, LruPolicy())
    assert outcome.waits == [2.0, 0.0, 2.0]  # 1 s and 2 x 50 bytes at 100 a second
    assert (outcome.hits, outcome.loads, outcome.evictions) == (1, 2, 0)
    assert outcome.bytes_copied == 200
    assert outcome.seconds == pytest.approx(22.0)


def test_a_shared_expert_is_copied_once() -> None:
    pools = pool_set(a=(0, 1), b=(1, 2))
    assert simulate(arrivals("ab"), pools, 4, LINK, LruPolicy()).bytes_copied == 150


def test_belady_keeps_what_comes_back_first() -> None:
    trace = arrivals("abcabcabc")
    lru = simulate(trace, THREE, 4, LINK, LruPolicy())
    best = simulate(trace, THREE, 4, LINK, Belady(trace, THREE))
    assert lru.hits == 0  # a cycle one longer than the room is LRU's worst
    assert best.hits == 3


def test_belady_orders_by_the_next_use() -> None:
    keys = {name: pool.content_hash for name, pool in THREE.pools.items()}
    policy = Belady(arrivals("abcba"), THREE)
    by_name = {key: name for name, key in keys.items()}
    for now, order in ((0.0, "acb"), (10.0, "abc"), (20.0, "cab"), (30.0, None)):
        found = "".join(by_name[key] for key in policy.coldest_first(keys.values(), now))
        assert order is None or found == order
    assert by_name[policy.coldest_first(keys.values(), 30.0)[-1]] == "a"


def test_a_pool_in_use_is_waited_for_and_a_full_line_refused() -> None:
    trace = [Arrival(0.0, "a", 30.0), Arrival(5.0, "b", 1.0), Arrival(6.0, "c", 1.0)]
    outcome = simulate(trace, THREE, 2, LINK, LruPolicy(), max_waiting=1)
    assert outcome.waits == [2.0, pytest.approx(29.0)]  # a ends at 32 s, b is loaded at 34 s
    assert outcome.refusals == Counter(TooManyWaiting=1)
    assert outcome.figures()["served_share"] == pytest.approx(2 / 3)


def test_equal_arguments_give_equal_figures() -> None:
    pools = released_pools(count=8, layers=2)

    def figures() -> dict[str, object]:
        trace = zipf_trace(
            list(pools.pools),
            count=200,
            rate=4.0,
            service_seconds=1.0,
            exponent=1.0,
            drift_seconds=10.0,
            session_requests=4,
            seed=3,
        )
        return simulate(trace, pools, 48, LINK, LruPolicy()).figures()

    assert figures() == figures()


@pytest.mark.parametrize("session_requests", [1, 8])
def test_a_trace_has_about_as_many_requests_as_asked_and_in_order(session_requests: int) -> None:
    trace = zipf_trace(
        "abcdefgh",
        count=4000,
        rate=10.0,
        service_seconds=0.5,
        exponent=1.0,
        drift_seconds=None,
        session_requests=session_requests,
        seed=5,
    )
    assert len(trace) == pytest.approx(4000, rel=0.1)
    assert trace == sorted(trace, key=lambda arrival: arrival.at_seconds)
    counts = [count for _, count in Counter(a.pool for a in trace).most_common()]
    assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.35)
    assert sum(a.service_seconds for a in trace) / len(trace) == pytest.approx(0.5, rel=0.1)


def test_made_up_pools_have_the_released_geometry_and_share_experts() -> None:
    pools = released_pools()
    assert pools.experts_per_layer == (128,) * 16
    assert pools.slot_bytes == 12_582_912
    sizes = {len(ids) for pool in pools.pools.values() for ids in pool.expert_ids}
    assert sizes == {16, 32}
    assert all(127 in ids for pool in pools.pools.values() for ids in pool.expert_ids)
    assert 0.1 < mean_overlap(list(pools.pools.values())) < 0.3


def test_a_request_log_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    records = [
        {"at_seconds": 1007.5, "pool": "b", "service_seconds": 2.0, "outcome": "finished"},
        {"at_seconds": 1000.0, "pool": "a", "service_seconds": 1.0, "outcome": "aborted"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_trace(path) == [Arrival(0.0, "a", 1.0), Arrival(7.5, "b", 2.0)]


def test_a_request_log_may_name_unions_and_the_base_pool() -> None:
    pools = THREE.knowing(["a", "a+b", "base", "a+b"])
    assert sorted(pools.pools) == ["a", "a+b", "b", "base", "c"]
    assert pools.pools["a+b"].expert_ids == ((0, 1, 2, 3),)
    assert pools.pools["base"].expert_ids == (tuple(range(12)),)
    trace = [Arrival(0.0, "base", 1.0), Arrival(1.0, "a+b", 1.0)]
    outcome = simulate(trace, pools, 4, LINK, LruPolicy())
    assert outcome.refusals == Counter(PoolTooLarge=1)
    assert len(outcome.waits) == 1


def test_a_request_log_may_name_sizes() -> None:
    pools = demo_pools().knowing(["math@4", "c+math@4"])
    assert list(map(len, pools.pools["math@4"].expert_ids)) == [4] * 4
    assert pools.pools["c+math@4"].name == "c+math@4"


def test_quantiles_of_few_and_none() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 3.0], 0.99) == 3.0
