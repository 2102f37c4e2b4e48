"""One order for all routers, which a replica more or less hardly changes."""

from __future__ import annotations

from collections import Counter

import pytest

from emo_serve.cluster.recent import RecentlySent
from emo_serve.cluster.rendezvous import Rendezvous

REPLICAS = [f"replica-{number}" for number in range(8)]
POOLS = [f"pool-{number}" for number in range(2000)]


def order(pool: str, replicas: list[str]) -> list[str]:
    ranks = Rendezvous().ranks(pool, replicas)
    assert sorted(ranks.values()) == list(range(len(replicas)))
    return sorted(ranks, key=ranks.__getitem__)


def test_the_order_does_not_depend_on_that_of_the_list() -> None:
    assert order("math", REPLICAS) == order("math", REPLICAS[::-1])
    assert order("math", REPLICAS) != order("code", REPLICAS)


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    assert order("math", REPLICAS[:3]) == ["replica-2", "replica-1", "replica-0"]


def test_one_replica_less_changes_nothing_among_the_others() -> None:
    for pool in POOLS[:50]:
        whole = order(pool, REPLICAS)
        for gone in REPLICAS:
            rest = [one for one in REPLICAS if one != gone]
            assert order(pool, rest) == [one for one in whole if one != gone]


def test_pools_are_spread_evenly() -> None:
    firsts = Counter(order(pool, REPLICAS)[0] for pool in POOLS)
    assert set(firsts) == set(REPLICAS)
    assert max(firsts.values()) < 1.25 * len(POOLS) / len(REPLICAS)


def test_what_is_remembered_is_bounded_and_new_members_are_seen() -> None:
    rendezvous = Rendezvous()
    for number in range(5000):
        rendezvous.ranks(f"union-{number}", REPLICAS)
    assert len(rendezvous._ranks) == 4096
    assert set(rendezvous.ranks("math", REPLICAS[:2])) == set(REPLICAS[:2])
    assert len(rendezvous._ranks) == 1


def test_what_was_sent_is_remembered_for_a_while() -> None:
    recent = RecentlySent(5.0)
    recent.note("math", "a", 10.0)
    assert recent.has("math", "a", 14.9)
    assert not recent.has("math", "a", 15.0)
    assert not recent.has("math", "b", 11.0)
    recent.note("math", "a", 14.0)
    assert recent.has("math", "a", 18.0)


@pytest.mark.parametrize("count", [9000])
def test_memory_of_what_was_sent_is_bounded(count: int) -> None:
    recent = RecentlySent(1e9)
    for number in range(count):
        recent.note(f"union-{number}", "a", 0.0)
    assert not recent.has("union-0", "a", 1.0)
    assert recent.has(f"union-{count - 1}", "a", 1.0)
    assert len(recent._sent_at) == 8192
