"""The cluster simulation's own parts: accounts that add up, and proxies that know only so much."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cluster.fleet import Fleet, FleetSettings, Outcome, play
from benchmarks.cluster.replica import ReplicaSize
from benchmarks.cluster.simulation import VARIED, Case, simulate
from benchmarks.cluster.strategies import STRATEGIES, ConsistentHash, Oracle, RoundRobin
from benchmarks.cluster.traces import CROWD, fleet_trace
from benchmarks.residency.simulation import Link
from benchmarks.residency.traces import Arrival, PoolSet
from benchmarks.residency.virtual_time import run
from emo_serve.cluster.asked import Asked
from emo_serve.cluster.router import ReplicaView, RouterLimits
from emo_serve.pools.pool import ExpertPool, LayerExperts

LINK = Link(overhead_seconds=1.0, bytes_per_second=100.0)
POOLS = PoolSet(
    "test",
    {
        name: ExpertPool(name, (LayerExperts((2 * place, 2 * place + 1)),))
        for place, name in enumerate("abcdef")
    },
    (12,),
    slot_bytes=50,
)
SIZE = ReplicaSize(slots_per_layer=4, max_running=2, max_pools=8, link=LINK)
SETTINGS = FleetSettings(num_replicas=2, limits=RouterLimits(1, 2), num_proxies=2)


def arrivals(text: str, every: float, service_seconds: float) -> list[Arrival]:
    return [Arrival(every * i, pool, service_seconds) for i, pool in enumerate(text)]


def outcome_of(text: str, every: float, service: float, strategy: str = "affinity") -> Outcome:
    return play(arrivals(text, every, service), POOLS, SIZE, SETTINGS, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_request_is_answered_once_and_counted(strategy: str) -> None:
    outcome = outcome_of("abcabcaabbcc", 3.0, 1.0, strategy)
    figures = outcome.figures()
    assert (figures["requests"], figures["refused"]) == (12, 0.0)
    assert sorted(one.arrival.at_seconds for one in outcome.answers) == [
        3.0 * number for number in range(12)
    ]
    assert outcome.loads == round(figures["loads_per_100"] * 12 / 100)
    assert outcome.bytes_copied == outcome.loads * 100
    hits = sum(one.is_hit for one in outcome.answers)
    assert hits + outcome.loads == 12, "no two requests shared a load"


def test_a_miss_waits_for_its_load_and_a_hit_for_nothing() -> None:
    waits = {one.arrival.at_seconds: one.wait_seconds for one in outcome_of("aab", 5, 1).answers}
    assert waits == {0.0: 2.0, 5.0: 0.0, 10.0: 2.0}  # 1 s and 2 x 50 bytes at 100 per second


def test_affinity_keeps_pools_apart_where_turns_mix_them() -> None:
    text = "acbd" * 10
    ours, turns = (outcome_of(text, 3.0, 0.5, name) for name in ("affinity", "round-robin"))
    assert ours.loads == 4
    assert ours.loads <= turns.loads
    assert ours.figures()["hit_rate"] == 0.9


def test_an_engine_runs_no_more_than_it_can() -> None:
    one = FleetSettings(num_replicas=1, limits=RouterLimits(1, 2))
    outcome = play(arrivals("aaaa", 0.0, 10.0), POOLS, SIZE, one, "affinity")
    waits = sorted(answer.wait_seconds or 0.0 for answer in outcome.answers)
    assert waits == [2.0, 2.0, 12.0, 12.0]


def test_warming_up_is_left_out_of_the_figures() -> None:
    outcome = outcome_of("ababab", 5.0, 1.0)
    assert outcome.figures()["hit_rate"] == pytest.approx(4 / 6)
    assert outcome.figures(after_seconds=10.0)["hit_rate"] == 1.0
    assert outcome.figures(after_seconds=10.0)["requests"] == 4


def test_a_proxy_knows_of_others_only_what_a_replica_told_it() -> None:
    async def program() -> list[list[int]]:
        fleet = Fleet(POOLS, SIZE, SETTINGS, "round-robin")
        seen = []

        def look() -> None:
            now = asyncio.get_running_loop().time()
            seen.append([view.load for view in fleet._views(0, now)])

        look()  # asks both replicas, which are idle
        async with asyncio.TaskGroup() as requests:
            for number, text in ((1, "a"), (3, "b"), (5, "c")):  # all of proxy 1
                requests.create_task(fleet.request(number, Arrival(0.0, text, 20.0)))
            await asyncio.sleep(5.0)
            look()  # still what they said
            requests.create_task(fleet.request(0, Arrival(5.0, "a", 0.5)))
            await asyncio.sleep(1.0)
            look()  # one of them took a request of its own, and said more
            await asyncio.sleep(10.0)
            look()  # asked again
        assert fleet.outcome.messages >= 3
        return seen

    first, still, told, later = run(program())
    assert first == still == [0, 0]
    assert sum(told) < 4 and max(told) >= 2
    assert sum(later) in (3, 4)


def test_equal_arguments_give_equal_figures_and_settings_matter() -> None:
    case = Case(2, 10, "affinity", 6.0, 15.0, 64, 1.0, seed=3)
    assert simulate(case) == simulate(case)
    for varied, settings in VARIED.items():
        for setting in settings:
            FleetSettings(2, **{"limits": RouterLimits.of(16), **settings[setting]})
        found = simulate(replace(case, varied=varied, setting=next(iter(settings))))
        assert found["setting"] == next(iter(settings))


def test_a_crowd_comes_for_one_pool_that_hardly_anybody_asked_for() -> None:
    options: dict[str, Any] = {
        "rate": 50.0,
        "seconds": 100.0,
        "service_seconds": 0.5,
        "exponent": 1.0,
        "num_drifts": 0,
        "seed": 1,
    }
    names = [f"p{number}" for number in range(20)]
    calm = Counter(one.pool for one in fleet_trace(names, crowd_share=0.0, **options))
    trace = fleet_trace(names, crowd_share=0.5, **options)
    assert trace == sorted(trace, key=lambda one: one.at_seconds)
    more = Counter(one.pool for one in trace) - calm
    ((pool, count),) = more.items()
    assert calm[pool] <= sorted(calm.values())[2]
    assert count == pytest.approx(0.5 * 50 * 20, rel=0.2)
    start, end = (100 * share for share in CROWD)
    times = [one.at_seconds for one in trace if one.pool == pool]
    assert sum(start <= at < end for at in times) >= count


def test_the_other_strategies_do_what_their_names_say() -> None:
    views = [ReplicaView(name, load, frozenset()) for name, load in (("x", 3), ("y", 0), ("z", 1))]
    turns, hashed = RoundRobin(), ConsistentHash()
    asked = Asked("a", ("a",))
    assert [turns.choose(0, asked, views, 0.0) for _ in range(4)] == ["y", "z", "x", "y"]
    assert [turns.choose(1, asked, views, 0.0) for _ in range(2)] == ["z", "x"]
    assert len({hashed.choose(proxy, asked, views, 0.0) for proxy in range(5)}) == 1
    oracle = Oracle(lambda name, _: {"x": (0.5, 1), "y": (0.2, 9), "z": (0.2, 3)}[name])
    assert oracle.choose(0, asked, views, 0.0) == "z"
