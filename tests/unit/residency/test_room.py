"""Room: slots and rows together, and who must go."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.errors import ConfigError, PoolTooLarge
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.room import Demand, Room
from emo_serve.residency.slots import SlotTable
from tests.support.residency_world import AB, BASE, NUM_EXPERTS, A, B, C, D, a_pool


def a_room(*pools: ExpertPool, slots: int = 4, rows: int = 9) -> Room:
    room = Room(SlotTable((NUM_EXPERTS, 0), slots), rows, slot_bytes=64)
    for pool in pools:
        take(room, pool)
    return room


def take(room: Room, pool: ExpertPool, *victims: ExpertPool) -> int:
    plan = room.plan(pool, [victim.content_hash for victim in victims])
    row = room.take(pool, plan)
    room.settle(pool.content_hash, is_loaded=True)
    room.check_integrity()
    return row


def choose(room: Room, pool: ExpertPool, *candidates: ExpertPool) -> list[str] | None:
    """Return the names of the victims."""
    names = {candidate.content_hash: candidate.name for candidate in candidates}
    chosen = room.choose(room.demand(pool), list(names))
    return None if chosen is None else [names[key] for key in chosen]


def fits(room: Room, *pools: ExpertPool, without: tuple[ExpertPool, ...] = ()) -> bool:
    wanted = Demand(0, 0)
    for pool in pools:
        wanted |= room.demand(pool)
    return room.fits(wanted, without={pool.content_hash for pool in without})


# -- what a pool takes --


def test_demands_share_experts_and_not_rows() -> None:
    room = a_room()
    both = room.demand(A) | room.demand(AB)
    assert (both.experts, both.rows) == (room.demand(AB).experts, 2)
    assert room.demand(BASE).rows == 0
    assert room.demand(a_pool("hot", *range(NUM_EXPERTS), temperature=2.0)).rows == 1


def test_what_fits_is_a_question_of_the_union() -> None:
    room = a_room(A, B)
    assert not fits(room, C)
    assert fits(room, AB)
    assert fits(room, C, without=(A,))
    assert fits(room, C, A, without=(A, B))
    assert fits(room, B, C, without=(A,))  # b is there
    assert not fits(room, C, D, without=(A,))
    assert fits(room, C, D, without=(A, B))


def test_rows_are_counted_with_slots() -> None:
    room = a_room(A, B, slots=NUM_EXPERTS, rows=3)
    assert not fits(room, C)
    assert fits(room, BASE)  # row 0 is its own
    assert fits(room, C, without=(A,))
    assert not fits(room, C, D, without=(A,))


def test_the_base_pools_row_is_no_row_to_win() -> None:
    room = a_room(BASE, A, slots=NUM_EXPERTS, rows=2)
    assert not fits(room, B, without=(BASE,))
    assert choose(room, B, BASE, A) == ["a"]


def test_what_fits_in_turn_is_counted_without_what_is_there() -> None:
    room = a_room(A, slots=6)
    assert room.num_fitting([A, B, C, D]) == 2
    assert room.num_fitting([AB, B, C, C, D]) == 3  # a union's experts are there for its parts
    assert room.num_fitting([BASE, D]) == 1
    assert a_room(A, slots=6, rows=3).num_fitting([B, C]) == 1
    assert room.num_fitting([]) == 0


# -- who must go --


def test_nobody_goes_in_vain() -> None:
    room = a_room(a_pool("one", 0), a_pool("two", 1, 2), a_pool("three", 3, 4, 5), slots=6)
    one, two, three = a_pool("one", 0), a_pool("two", 1, 2), a_pool("three", 3, 4, 5)
    assert choose(room, a_pool("x", 6), one, two, three) == ["one"]
    assert choose(room, a_pool("x", 6, 7), one, two, three) == ["two"]  # one alone frees too few
    assert choose(room, a_pool("x", 0, 6, 7), one, two, three) == ["two"]
    assert choose(room, a_pool("x", 0, 1, 2, 6, 7), one, two, three) == ["three"]
    assert choose(room, a_pool("x", 0, 3), one, two, three) == []


def test_those_asked_last_stay_if_they_may() -> None:
    room = a_room(A, B)
    assert choose(room, C, A, B) == ["a"]
    assert choose(room, C, B, A) == ["b"]
    assert choose(room, C, A) == ["a"]
    assert choose(room, a_pool("x", 4, 5, 6), A, B) == ["a", "b"]
    assert choose(room, a_pool("x", 4, 5, 6), A) is None
    assert choose(room, C) is None
    assert choose(room, AB) == []


def test_a_pool_that_holds_what_another_gives_up_must_go_with_it() -> None:
    room = a_room(A, B, AB)
    assert choose(room, C, A, AB, B) == ["a", "a+b"]
    assert choose(room, C, A, B) is None


expert_sets = st.sets(st.integers(0, 5), min_size=1, max_size=4)


@given(
    held=st.lists(expert_sets, max_size=6),
    wanted=expert_sets,
    slots=st.integers(1, 6),
    rows=st.integers(2, 8),
)
def test_the_choice_suffices_and_no_part_of_it_does(
    held: list[set[int]], wanted: set[int], slots: int, rows: int
) -> None:
    """Against every subset: a choice exists if any would do, and each victim is needed."""
    room = Room(SlotTable((6,), slots), rows, slot_bytes=1)

    def pool_of(name: str, experts: set[int], temperature: float) -> ExpertPool:
        return ExpertPool(name, (LayerExperts(tuple(experts)),), temperature)

    pools = [pool_of(str(n), experts, 2.0 + n) for n, experts in enumerate(held)]
    kept = [pool for pool in pools if room.fits(room.demand(pool)) and take(room, pool)]
    keys = [pool.content_hash for pool in kept]
    new = room.demand(pool_of("new", wanted, 1.5))

    def would_do(victims: tuple[str, ...]) -> bool:
        left = [pool for pool in kept if pool.content_hash not in victims]
        union = wanted.union(*(pool.expert_ids[0] for pool in left))
        return len(union) <= slots and len(left) + 1 < rows

    chosen = room.choose(new, keys)
    every = [subset for n in range(len(keys) + 1) for subset in combinations(keys, n)]
    assert (chosen is not None) == any(map(would_do, every))
    if chosen is not None:
        assert would_do(tuple(chosen))
        assert chosen == [key for key in keys if key in chosen]
        for key in chosen:
            assert not would_do(tuple(victim for victim in chosen if victim != key))
        for subset in every:
            assert room.fits(new, without=subset) == would_do(subset)


# -- taking and giving back --


def test_rows_are_handed_out_lowest_first_and_come_back() -> None:
    room = a_room(slots=NUM_EXPERTS, rows=4)
    assert [take(room, pool) for pool in (A, BASE, B)] == [1, 0, 2]
    room.evict(A.content_hash)
    room.check_integrity()
    assert take(room, C) == 1
    assert take(room, D) == 3
    assert room.num_free_rows == 0
    assert take(room, A, C, B) == 1
    assert room.num_free_rows == 1


def test_a_failed_load_gives_back_slots_and_row() -> None:
    room = a_room(A)
    before = room.num_free_rows, room.slots.usage()
    room.take(B, room.plan(B, []))
    room.settle(B.content_hash, is_loaded=False)
    room.check_integrity()
    assert (room.num_free_rows, room.slots.usage()) == before


def test_a_pool_too_large_is_refused_with_the_memory_it_needs() -> None:
    room = a_room()
    room.check_can_ever_fit(AB)
    with pytest.raises(PoolTooLarge, match="layer 0 needs 8 slots and has 4; .* --expert-memory"):
        room.check_can_ever_fit(BASE)


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of the pool table: 0; expected at least 1"):
        a_room(rows=0)


def test_the_self_check_sees_a_lost_row() -> None:
    room = a_room(A)
    room._free_rows.pop()
    with pytest.raises(AssertionError):
        room.check_integrity()
