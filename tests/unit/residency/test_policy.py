"""One suite of promises that every eviction policy keeps, then what sets each apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.errors import ConfigError
from emo_serve.residency import policy as policy_module
from emo_serve.residency.policy import (
    POLICIES,
    REMEMBERED_KEYS,
    EvictionPolicy,
    LfuPolicy,
    LruPolicy,
    PinnedFirstPolicy,
    make_policy,
)

KEYS = "abcdefgh"
MAKERS: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "lfu-short": lambda: LfuPolicy(half_life_seconds=0.5),
    "pinned-first": lambda: PinnedFirstPolicy({"b", "e"}),
    "pinned-first-none": PinnedFirstPolicy,
}

keys = st.sampled_from(KEYS)
asks = st.lists(st.tuples(keys, st.floats(0, 1e4)), max_size=40)


History = list[tuple[str, float]]
Maker = Callable[[], EvictionPolicy]
each_policy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def play(policy: EvictionPolicy, history: History) -> float:
    """Tell a policy of requests, each some seconds after the one before; return the time."""
    now = 100.0
    for key, seconds in history:
        now += seconds
        policy.note_asked(key, now)
    return now


# -- the contract --


def test_the_names_are_the_flags_values() -> None:
    assert [make_policy(name).name for name in POLICIES] == list(POLICIES)
    assert {make().name for make in MAKERS.values()} == set(POLICIES)


@each_policy
@given(history=asks, asked=st.sets(keys), data=st.data())
def test_all_keys_come_back_once_in_an_order_of_their_own(
    make: Maker, history: History, asked: set[str], data: st.DataObject
) -> None:
    policy = make()
    now = play(policy, history)
    order = policy.coldest_first(asked, now)
    assert sorted(order) == sorted(asked)
    shuffled = data.draw(st.permutations(sorted(asked)))
    assert policy.coldest_first(shuffled, now) == order


@each_policy
@given(history=asks, asked=st.sets(keys, min_size=1))
def test_an_order_holds_for_every_part_of_the_keys(
    make: Maker, history: History, asked: set[str]
) -> None:
    policy = make()
    now = play(policy, history)
    everything = policy.coldest_first(KEYS, now)
    assert policy.coldest_first(asked, now) == [key for key in everything if key in asked]


@each_policy
@given(history=asks)
def test_asking_changes_nothing_and_equal_histories_agree(make: Maker, history: list) -> None:
    policy, twin = make(), make()
    now = play(policy, history)
    for _ in range(3):
        policy.coldest_first(KEYS, now)
    play(twin, history)
    assert policy.coldest_first(KEYS, now) == twin.coldest_first(KEYS, now)


@each_policy
@given(history=asks, forgotten=keys)
def test_a_forgotten_key_is_as_one_never_asked_for(
    make: Maker, history: History, forgotten: str
) -> None:
    policy, twin = make(), make()
    now = play(policy, history)
    policy.forget(forgotten)
    policy.forget("never seen")
    when = 100.0
    for key, seconds in history:
        when += seconds
        if key != forgotten:
            twin.note_asked(key, when)
    assert policy.coldest_first(KEYS, now) == twin.coldest_first(KEYS, now)


@each_policy
@given(history=asks, later=st.floats(0, 1e9))
def test_waiting_alone_reorders_nothing(make: Maker, history: History, later: float) -> None:
    policy = make()
    now = play(policy, history)
    assert policy.coldest_first(KEYS, now) == policy.coldest_first(KEYS, now + later)


@each_policy
def test_one_request_is_warmer_than_none(make: Maker) -> None:
    policy = make()
    policy.note_asked("a", 1.0)
    assert policy.coldest_first(["a", "c"], 1.0) == ["c", "a"]


@each_policy
def test_unknown_keys_are_in_order_of_key(make: Maker) -> None:
    assert make().coldest_first(["h", "c", "g"], 0.0) == ["c", "g", "h"]


@each_policy
def test_clients_cannot_make_it_remember_without_end(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "REMEMBERED_KEYS", 8)
    policy = make()
    policy.note_asked("old", 0.0)
    policy.note_asked("popular", 0.0)
    for number in range(100):
        policy.note_asked(f"union {number:03}", float(number))
        policy.note_asked("popular", float(number))
    assert remembered(policy) == 8
    assert policy.coldest_first(["old", "popular"], 100.0) == ["old", "popular"]
    assert policy.coldest_first(["old", "union 099"], 100.0) == ["old", "union 099"]


def remembered(policy: EvictionPolicy) -> int:
    if isinstance(policy, LfuPolicy):
        return len(policy._heat._numbers)
    lru = policy._recency if isinstance(policy, PinnedFirstPolicy) else policy
    assert isinstance(lru, LruPolicy)
    return len(lru._asked_at._numbers)


def test_the_bound_leaves_room_for_every_real_pool() -> None:
    assert REMEMBERED_KEYS >= 1024


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="'fifo' is not known; there are lfu, lru, pinned-first"):
        make_policy("fifo")


# -- lru --


@given(history=asks)
def test_lru_orders_by_the_last_request(history: History) -> None:
    policy = LruPolicy()
    now = play(policy, history)
    last: dict[str, float] = {}
    when = 100.0
    for key, seconds in history:
        when += seconds
        last[key] = when
    order = policy.coldest_first(KEYS, now)
    assert all((last.get(a, 0.0), a) < (last.get(b, 0.0), b) for a, b in pairwise(order))


# -- lfu --


def naive_counts(times: dict[str, list[float]], now: float, half_life: float) -> dict[str, float]:
    return {key: sum(2 ** ((t - now) / half_life) for t in times[key]) for key in times}


def test_lfu_orders_by_the_decayed_count() -> None:
    rng = random.Random(7)
    policy = LfuPolicy(half_life_seconds=20.0)
    times: dict[str, list[float]] = {key: [] for key in KEYS}
    now = 0.0
    for _ in range(500):
        now += rng.expovariate(1.0)
        key = rng.choices(KEYS, range(1, len(KEYS) + 1))[0]
        policy.note_asked(key, now)
        times[key].append(now)
        counts = naive_counts(times, now, 20.0)
        assert policy.coldest_first(KEYS, now) == sorted(KEYS, key=lambda k: (counts[k], k))


def test_lfu_lets_a_burst_of_the_past_cool_down() -> None:
    policy = LfuPolicy(half_life_seconds=10.0)
    for _ in range(8):
        policy.note_asked("burst", 0.0)
    policy.note_asked("new", 29.0)
    assert policy.coldest_first(["burst", "new"], 29.0) == ["new", "burst"]  # 8 / 7.46 > 1
    policy.note_asked("late", 31.0)
    assert policy.coldest_first(["burst", "late"], 31.0) == ["burst", "late"]


def test_lfu_counts_through_years_and_floods() -> None:
    policy = LfuPolicy(half_life_seconds=0.01)
    for _ in range(10_000):
        policy.note_asked("flood", 0.0)
    for _ in range(2):
        policy.note_asked("late", 1e9)
    policy.note_asked("once", 1e9)
    assert policy.coldest_first(["late", "once", "flood"], 1e9) == ["flood", "once", "late"]


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("nan"), float("inf")])
def test_lfu_refuses_a_half_life_that_is_none(half_life: float) -> None:
    with pytest.raises(ConfigError, match="half-life"):
        LfuPolicy(half_life)


# -- pinned-first --


def test_preferred_pools_are_given_up_last() -> None:
    policy = make_policy("pinned-first", preferred=["b", "e"])
    for now, key in enumerate("beadc"):
        policy.note_asked(key, float(now))
    assert policy.coldest_first("abcde", 9.0) == ["a", "d", "c", "b", "e"]
    policy.forget("e")
    assert policy.coldest_first("abcde", 9.0) == ["a", "d", "c", "e", "b"]


@given(history=asks)
def test_without_preferences_it_is_lru(history: History) -> None:
    policy, lru = PinnedFirstPolicy(), LruPolicy()
    now = play(policy, history)
    play(lru, history)
    assert policy.coldest_first(KEYS, now) == lru.coldest_first(KEYS, now)
