"""The account of pools that have room: leases, pins, closing, and what has to go."""

from __future__ import annotations

import pytest

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency import resident as module
from emo_serve.residency.ports import NullObserver
from emo_serve.residency.records import ResidentPool
from emo_serve.residency.resident import ResidentPools
from emo_serve.residency.room import Room
from emo_serve.residency.slots import SlotTable
from tests.support.fake_engine import SLOT_BYTES
from tests.support.residency_world import NUM_EXPERTS, A, B, C


class World:
    """Pools that are given room without an engine."""

    def __init__(self) -> None:
        self.evictions: list[tuple[str, str]] = []
        self.room = Room(SlotTable((NUM_EXPERTS, 0), 4), 9, SLOT_BYTES)
        self.pools = ResidentPools(self.room, _Recording(self.evictions))

    def begin(self, pool: ExpertPool, *victims: ExpertPool) -> ResidentPool:
        keys = [victim.content_hash for victim in victims]
        return self.pools.begin(pool, self.room.plan(pool, keys), {})

    def add(self, pool: ExpertPool, *victims: ExpertPool) -> ResidentPool:
        resident = self.begin(pool, *victims)
        self.pools.publish(resident)
        self.pools.check_integrity()
        return resident


class _Recording(NullObserver):
    def __init__(self, evictions: list[tuple[str, str]]) -> None:
        self._evictions = evictions

    def count_eviction(self, pool: str, reason: str) -> None:
        self._evictions.append((pool, reason))


@pytest.fixture
def world() -> World:
    return World()


def test_a_pool_is_open_once_it_is_published(world: World) -> None:
    resident = world.begin(A)
    assert A.content_hash in world.pools and world.pools.get_open(A.content_hash) is None
    assert world.pools.evictable == []
    world.pools.publish(resident)
    assert world.pools.get_open(A.content_hash) is resident
    assert world.pools.evictable == [resident]
    world.pools.check_integrity()


def test_a_load_that_failed_leaves_no_trace(world: World) -> None:
    resident = world.begin(A)
    world.pools.abandon(resident)
    assert resident.gone.is_set() and list(world.pools) == []
    assert world.room.num_free_rows == 8 and world.evictions == []
    world.pools.check_integrity()


def test_victims_go_when_the_load_begins(world: World) -> None:
    first, second = world.add(A), world.add(B)
    world.begin(C, A)
    assert first.gone.is_set() and not second.gone.is_set()
    assert world.evictions == [("a", "room")]
    assert [one.pool for one in world.pools] == [B, C]
    world.pools.check_integrity()


def test_a_pin_opens_what_was_closing_and_is_not_evictable(world: World) -> None:
    first, second = world.add(A), world.add(B)
    world.pools.close_only([first.key])
    world.pools.pin(first)
    assert world.pools.get_open(first.key) is first
    assert world.pools.evictable == [second]
    assert world.pools.unpinned == {second.key}
    assert world.pools.pinned_names == ["a"]
    world.pools.unpin(first.key)
    world.pools.unpin(second.key)  # a no-op
    assert world.pools.unpinned == {first.key, second.key}


def test_closing_others_tells_whether_any_opened(world: World) -> None:
    first, second = world.add(A), world.add(B)
    assert not world.pools.close_only([first.key])
    assert not world.pools.close_only([first.key, second.key])
    assert world.pools.close_only([second.key])
    assert (first.is_open, second.is_open) == (True, False)
    world.pools.reopen(second.key)
    world.pools.reopen(C.content_hash)  # has no room: a no-op
    assert second.is_open


def test_what_must_go_goes_with_its_last_lease(world: World) -> None:
    retired, drained = world.add(A), world.add(B)
    for resident in (retired, drained):
        world.pools.add_lease(resident, resident.pool.name)
    world.pools.retire(retired.key)
    world.pools.start_drain(drained)
    assert not world.pools.evict_leaving() and world.pools.num_leases == 2
    for resident in (retired, drained):
        assert world.pools.get_open(resident.key) is None
        world.pools.end_lease(resident, resident.pool.name)
    assert world.pools.evict_leaving()
    assert world.evictions == [("a", "retired"), ("b", "operator")]
    assert not world.pools.evict_leaving()
    world.pools.check_integrity()


def test_a_retired_pool_that_is_loaded_again_is_still_retired(world: World) -> None:
    """It is loaded for requests admitted before; a new definition alone can revive it."""
    world.pools.retire(A.content_hash)
    resident = world.add(A)
    assert not resident.is_open
    assert world.pools.revive(A.content_hash) and resident.is_open
    assert not world.pools.revive(A.content_hash)
    assert not world.pools.evict_leaving()


def test_a_retired_pool_is_not_pinned_any_more_and_cannot_be(world: World) -> None:
    resident = world.add(A)
    world.pools.pin(resident)
    world.pools.retire(resident.key)
    assert not world.pools.is_pinned(resident.key)
    with pytest.raises(AssertionError):
        world.pools.pin(resident)


def test_only_so_many_retired_definitions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED_RETIRED", 2)
    world = World()
    for pool in (A, B, C):
        world.pools.retire(pool.content_hash)
    assert [world.add(A).is_retired, world.add(C).is_retired] == [False, True]


def test_the_room_is_checked_too(world: World) -> None:
    world.add(A)
    world.room.evict(A.content_hash)  # behind its owner's back
    with pytest.raises(AssertionError):
        world.pools.check_integrity()
