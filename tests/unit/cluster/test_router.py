"""The rules of the router: residency, what was sent, the order by hash, and how copies spread."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cluster.asked import ANYTHING, Asked
from emo_serve.cluster.rendezvous import Rendezvous
from emo_serve.cluster.router import PoolRouter, ReplicaView, RouterLimits, Why
from emo_serve.errors import ConfigError
from emo_serve.names import split_name

LIMITS = RouterLimits(calm_margin=4, spread_margin=8, memory_seconds=5.0)
NAMES = [f"r{number}" for number in range(4)]


def asked(name: str) -> Asked:
    return Asked(name, split_name(name))


def view(name: str, load: int = 0, *pools: str, fits: tuple[str, ...] = ()) -> ReplicaView:
    return ReplicaView(name, load, frozenset(pools), frozenset(fits))


def order(pool: str) -> list[str]:
    ranks = Rendezvous().ranks(pool, NAMES)
    return sorted(ranks, key=ranks.__getitem__)


def a_router(seed: int = 0) -> PoolRouter:
    return PoolRouter(LIMITS, random.Random(seed))


def views(loads: dict[str, int] | None = None, **pools: tuple[str, ...]) -> list[ReplicaView]:
    return [view(name, (loads or {}).get(name, 0), *pools.get(name, ())) for name in NAMES]


# -- one request --


def test_a_resident_pool_is_served_where_it_is_though_others_are_idler() -> None:
    replicas = [view("r0", 4, "math"), view("r1", 0, "code"), view("r2", 1)]
    choice = a_router().choose(asked("math"), replicas, 0.0)
    assert (choice.order, choice.why) == (("r0", "r1", "r2"), Why.RESIDENT)


def test_of_several_copies_the_first_in_order_fills_first() -> None:
    first, second, *rest = order("math")
    everywhere = dict.fromkeys(NAMES, ("math",))
    for load, chosen in ((0, first), (4, first), (5, second)):
        choice = a_router().choose(asked("math"), views({first: load}, **everywhere), 0.0)
        assert (choice.order[0], choice.why) == (chosen, Why.RESIDENT)
    busy = views({first: 9, second: 5}, **everywhere)
    tried = a_router().choose(asked("math"), busy, 0.0).order
    assert (tried[0], tried[-2:]) == (rest[0], (second, first))


def test_a_burst_is_borne_and_a_hot_pool_gets_a_copy() -> None:
    for load, why in ((4, Why.RESIDENT), (5, Why.BUSY), (8, Why.BUSY), (9, Why.NEW)):
        choice = a_router().choose(asked("math"), views({"r0": load}, r0=("math",)), 0.0)
        assert choice.why is why
        assert (choice.order[0] == "r0") is (why is not Why.NEW)
    assert choice.order[0] == next(name for name in order("math") if name != "r0")
    assert choice.order[1] == "r0", "the one that has it is tried next"


def test_what_was_sent_counts_until_it_is_too_long_ago() -> None:
    router = a_router()
    router.note_sent(asked("math"), "r2", 0.0)
    assert router.choose(asked("math"), views(), 4.9).order[0] == "r2"
    assert router.choose(asked("math"), views(), 4.9).why is Why.RECENT
    assert router.choose(asked("math"), views(), 5.0).why is Why.NEW
    assert router.choose(asked("code"), views(), 1.0).why is Why.NEW


def test_a_new_copy_on_its_way_is_used_before_another_is_made() -> None:
    router = a_router()
    replicas = views({"r0": 9}, r0=("math",))
    placed = router.choose(asked("math"), replicas, 0.0).order[0]
    router.note_sent(asked("math"), placed, 0.0)
    again = router.choose(asked("math"), replicas, 1.0)
    assert (again.order[0], again.why) == (placed, Why.RECENT)


def test_a_cold_pool_goes_where_it_fits_in_the_order_of_its_hash() -> None:
    first, second, third, fourth = order("math")
    choose = a_router().choose
    assert choose(asked("math"), views(), 0.0).order[0] == first
    roomy = [view(name, 0, fits=("math",) * (name in (third, fourth))) for name in NAMES]
    assert choose(asked("math"), roomy, 0.0).order[0] == third
    assert choose(asked("law"), roomy, 0.0).order[0] == order("law")[0]
    busy = [replace(one, load=5 * (one.name == third)) for one in roomy]
    assert choose(asked("math"), busy, 0.0).order[0] == fourth
    for load, chosen in ((2, first), (3, second)):  # half the margin, since another pool must go
        assert choose(asked("math"), views({first: load}), 0.0).order[0] == chosen
    fitting = [view(name, 4 * (name == first), fits=("math",)) for name in NAMES]
    assert choose(asked("math"), fitting, 0.0).order[0] == first


def test_a_union_goes_to_its_own_row_then_to_all_its_parts_then_to_some() -> None:
    union = asked("code+math")
    choose = a_router().choose
    for pools, why in (
        ({"r3": ("code+math",)}, Why.RESIDENT),
        ({"r3": ("code", "math"), "r0": ("math",)}, Why.RESIDENT),
        ({"r3": ("math",), "r0": ("law",)}, Why.PARTS),
        ({"r3": ("base",)}, Why.RESIDENT),
    ):
        choice = choose(union, views(**pools), 0.0)
        assert (choice.order[0], choice.why) == ("r3", why)
    assert choose(union, views(), 0.0).order[0] == order("code+math")[0]


def test_a_replica_with_all_experts_has_every_pool_but_not_the_other_way_round() -> None:
    choose = a_router().choose
    assert choose(asked("math"), views(r1=("base",)), 0.0).order[0] == "r1"
    assert choose(asked("base"), views(r1=("math", "code")), 0.0).why is Why.NEW


def test_anything_goes_to_the_idlest_and_leaves_no_trace() -> None:
    router = a_router()
    replicas = views({"r0": 3, "r1": 2, "r2": 5, "r3": 4}, r2=("base",))
    choice = router.choose(ANYTHING, replicas, 0.0)
    assert (choice.order, choice.why) == (("r1", "r0", "r3", "r2"), Why.ANY)
    router.note_sent(ANYTHING, "r1", 0.0)
    assert not router._recent._sent_at
    even = Counter(router.choose(ANYTHING, views(), 0.0).order[0] for _ in range(400))
    assert set(even) == set(NAMES), "equally idle replicas take turns by chance"


def test_no_replica_and_margins_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="no replica"):
        a_router().choose(asked("math"), [], 0.0)
    for calm, spread in ((-1, 2), (3, 2)):
        with pytest.raises(ConfigError, match="margin"):
            RouterLimits(calm, spread)
    assert RouterLimits.of(16) == RouterLimits(8, 16)
    assert RouterLimits.of(1) == RouterLimits(0, 1)
    with pytest.raises(ConfigError, match="memory"):
        RouterLimits(1, 2, memory_seconds=-1.0)


# -- properties --

POOLS = ("a", "b", "c", "a+b", "base")
replica_lists = st.lists(
    st.builds(
        ReplicaView,
        st.sampled_from([f"x{number}" for number in range(12)]),
        st.integers(0, 20),
        st.frozensets(st.sampled_from(POOLS)),
        st.frozensets(st.sampled_from(POOLS)),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda one: one.name,
)


@given(replica_lists, st.sampled_from(POOLS), st.booleans(), st.integers(0, 3))
def test_a_choice_is_never_busier_than_the_margins_and_never_misses_a_calm_copy(
    replicas: list[ReplicaView], pool: str, was_sent: bool, seed: int
) -> None:
    router = a_router(seed)
    if was_sent:
        router.note_sent(asked(pool), replicas[0].name, 0.0)
    choice = router.choose(asked(pool), replicas, 1.0)
    by_name = {one.name: one for one in replicas}
    assert sorted(choice.order) == sorted(by_name)
    first, idlest = by_name[choice.order[0]], min(one.load for one in replicas)
    margin = LIMITS.spread_margin if choice.why is Why.BUSY else LIMITS.calm_margin
    assert first.load <= idlest + margin
    copies = [one for one in replicas if one.has(asked(pool))]
    if any(one.load <= idlest + LIMITS.calm_margin for one in copies):
        assert choice.why is Why.RESIDENT and first in copies
    elif any(one.load <= idlest + LIMITS.spread_margin for one in copies):
        assert choice.why in (Why.RECENT, Why.BUSY)


@given(replica_lists, st.sampled_from(POOLS), st.randoms())
def test_routers_agree_without_talking(
    replicas: list[ReplicaView], pool: str, rng: random.Random
) -> None:
    shuffled = list(replicas)
    rng.shuffle(shuffled)
    one = a_router(1).choose(asked(pool), replicas, 0.0)
    other = a_router(2).choose(asked(pool), shuffled, 7.0)
    if one.why is not Why.BUSY:  # of equally idle copies, chance takes one
        assert (one.order[0], one.why) == (other.order[0], other.why)


@given(replica_lists, st.sampled_from(POOLS))
def test_a_replica_that_goes_moves_only_what_it_served(
    replicas: list[ReplicaView], pool: str
) -> None:
    even = [replace(one, load=0) for one in replicas]
    chosen = a_router().choose(asked(pool), even, 0.0).order[0]
    for gone in even:
        rest = [one for one in even if one is not gone]
        if gone.name != chosen:
            assert a_router().choose(asked(pool), rest, 0.0).order[0] == chosen


# -- a pool's copies over time --


class Fleet:
    """Replicas that have whatever was sent to them lately, and requests that stay for a while."""

    def __init__(self, count: int, keep_seconds: float = 20.0) -> None:
        self.names = [f"x{number}" for number in range(count)]
        self.router = a_router()
        self.running: list[tuple[float, str]] = []
        self.asked_at: dict[tuple[str, str], float] = {}
        self.keep_seconds = keep_seconds
        self.now = 0.0

    def run(self, pool: str, per_second: float, seconds: float, stay: float = 1.0) -> set[str]:
        """Send requests evenly; return which replicas took any in the second half."""
        used: set[str] = set()
        for number in range(round(per_second * seconds)):
            self.now += 1 / per_second
            self.running = [(end, name) for end, name in self.running if end > self.now]
            load = Counter(name for _, name in self.running)
            replicas = [view(name, load[name], *self.pools(name)) for name in self.names]
            chosen = self.router.choose(asked(pool), replicas, self.now).order[0]
            self.router.note_sent(asked(pool), chosen, self.now)
            self.asked_at[chosen, pool] = self.now
            self.running.append((self.now + stay, chosen))
            if number > per_second * seconds / 2:
                used.add(chosen)
        return used

    def pools(self, name: str) -> list[str]:
        return [
            pool
            for (replica, pool), at in self.asked_at.items()
            if replica == name and self.now - at < self.keep_seconds
        ]


def test_a_hot_pool_has_as_many_copies_as_its_load_needs_and_shrinks_back() -> None:
    fleet = Fleet(8)
    quiet = fleet.run("math", per_second=3, seconds=60)
    hot = fleet.run("math", per_second=30, seconds=60)
    hottest = fleet.run("math", per_second=100, seconds=60)
    calm = fleet.run("math", per_second=3, seconds=60)
    assert [len(used) for used in (quiet, hot, hottest, calm)] == [1, 4, 8, 1]
    assert calm == quiet < hot < hottest
