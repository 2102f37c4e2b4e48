"""How alike pools are and what they need together, against plain sets and the slot table."""

from __future__ import annotations

import time
from itertools import combinations
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.cli.rendering.comparison import describe_comparison, slab_bytes, slot_table
from emo_serve.config import slots_for_memory
from emo_serve.errors import PoolFileError
from emo_serve.pools.comparison import PoolComparison, jaccard
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.slots import SlotTable

NUM_EXPERTS = (7, 0, 5)  # the second layer is dense


def a_pool(name: str, *layers: set[int] | None) -> ExpertPool:
    return ExpertPool(
        name, tuple(None if ids is None else LayerExperts(tuple(ids)) for ids in layers)
    )


def some_pools(most: int = 5) -> st.SearchStrategy[list[ExpertPool]]:
    """Draw pools of one model, with names by number; a set may be empty."""
    first, third = (st.sets(st.integers(0, count - 1)) for count in (7, 5))
    return st.lists(st.tuples(first, third), min_size=1, max_size=most).map(
        lambda drawn: [a_pool(f"p{i}", a, None, c) for i, (a, c) in enumerate(drawn)]
    )


MATH = a_pool("math", {0, 1, 2, 6}, None, {0, 4})
CODE = a_pool("code", {2, 3, 4, 6}, None, {0, 4})
LAW = a_pool("law", {0, 5, 6}, None, {1, 2, 4})


# -- how alike --


def test_three_pools_by_hand() -> None:
    comparison = PoolComparison([MATH, CODE, LAW])
    assert comparison.names == ("math", "code", "law")
    assert comparison.layers == (0, 2)
    math_code, math_law, code_law = comparison.pairs
    assert math_code.per_layer == (2 / 6, 1.0)
    assert math_law.per_layer == (2 / 5, 1 / 4)
    assert code_law.per_layer == (1 / 6, 1 / 4)
    assert math_code.similarity == pytest.approx(2 / 3)
    assert comparison.similarity[0] == (1.0, math_code.similarity, math_law.similarity)
    assert comparison.overlap[0] == (
        mean([2 / 4, 2 / 4]),
        mean([2 / 4, 1 / 4]),
        mean([2 / 3, 1 / 3]),
    )
    assert comparison.unions == (7, 4)
    assert comparison.in_every_pool == (1, 1)
    assert comparison.sizes == ((4, 2), (4, 2), (3, 3))
    assert comparison.slots == 7


@given(st.frozensets(st.integers(0, 9)), st.frozensets(st.integers(0, 9)))
def test_jaccard_is_symmetric_and_between_0_and_1(a: frozenset[int], b: frozenset[int]) -> None:
    assert jaccard(a, b) == jaccard(b, a)
    assert 0 <= jaccard(a, b) <= 1
    assert (jaccard(a, b) == 1) == (a == b)
    assert (jaccard(a, b) == 0) == (a.isdisjoint(b) and bool(a | b))


@given(some_pools())
def test_the_matrices_are_bounded_and_follow_the_pools(pools: list[ExpertPool]) -> None:
    comparison, size = PoolComparison(pools), len(pools)
    for i in range(size):
        assert comparison.similarity[i][i] == 1
        for j in range(size):
            assert 0 <= comparison.similarity[i][j] <= 1
            assert comparison.similarity[i][j] == comparison.similarity[j][i]
    assert all(0 <= share <= 1 for row in comparison.overlap for share in row)
    backwards = PoolComparison(pools[::-1])
    assert backwards.similarity == tuple(row[::-1] for row in comparison.similarity[::-1])
    assert backwards.unions == comparison.unions
    assert backwards.in_every_pool == comparison.in_every_pool


def test_one_pool_is_alike_to_itself_alone() -> None:
    comparison = PoolComparison([MATH])
    assert comparison.similarity == ((1.0,),)
    assert comparison.pairs == ()
    assert "similarity" not in describe_comparison(comparison)
    assert "all together: --expert-slots 4" in describe_comparison(comparison)


def test_pools_of_other_models_are_refused() -> None:
    with pytest.raises(
        PoolFileError, match="'math' and 'other' are for models with different layers"
    ):
        PoolComparison([MATH, a_pool("other", {1}, {2}, {3})])
    with pytest.raises(PoolFileError, match="no MoE layer"):
        PoolComparison([a_pool("dense", None, None)])


# -- slots --


def fits(pools: tuple[ExpertPool, ...], slots: int) -> bool:
    """Load the pools into a real table of so many slots a layer, and say whether they all fit."""
    table = SlotTable(NUM_EXPERTS, slots)
    for pool in pools:
        if not table.fits(pool.expert_ids):
            return False
        table.begin(table.plan_load(pool.name, pool.expert_ids))
        table.finish(pool.name)
    table.check_integrity()
    held = {len(pool.expert_ids[layer]) for pool in pools for layer in (0, 2)}
    assert max(held) <= max(used.resident for used in table.usage())
    return True


@settings(max_examples=60, deadline=None)
@given(some_pools())
def test_needs_are_what_the_slot_table_takes(pools: list[ExpertPool]) -> None:
    comparison = PoolComparison(pools)
    by_name = {pool.name: pool for pool in pools}
    needs = comparison.subset_needs()
    assert [need.count for need in needs] == list(range(1, len(pools) + 1))
    assert needs[-1].fewest == needs[-1].most == comparison.slots
    for need in needs:
        assert need.is_exact
        subsets = list(combinations(pools, need.count))
        chosen = tuple(by_name[name] for name in need.names)
        assert len(chosen) == need.count
        for slots in range(1, max(NUM_EXPERTS) + 1):
            assert all(fits(subset, slots) for subset in subsets) == (slots >= need.most)
            assert any(fits(subset, slots) for subset in subsets) == (slots >= need.fewest)
            assert fits(chosen, slots) == (slots >= need.fewest)


@settings(max_examples=60, deadline=None)
@given(some_pools(), st.integers(0, 4))
def test_bounds_are_enough_for_what_they_promise(pools: list[ExpertPool], limit: int) -> None:
    comparison = PoolComparison(pools)
    exact, bounded = comparison.subset_needs(), comparison.subset_needs(most_subsets=max(1, limit))
    by_name = {pool.name: pool for pool in pools}
    for truth, bound in zip(exact, bounded, strict=True):
        assert bound.most >= truth.most
        assert bound.fewest >= truth.fewest
        assert bound.most <= comparison.slots
        assert len(set(bound.names)) == bound.count
        if bound.fewest:  # a table has at least one slot
            assert fits(tuple(by_name[name] for name in bound.names), bound.fewest)
        assert not bound.is_exact or bound == truth
    for few, more in zip(bounded, bounded[1:], strict=False):
        assert few.fewest <= more.fewest
        assert few.most <= more.most


def test_bounds_are_said_to_be_bounds() -> None:
    pools = [a_pool(f"p{i:02}", {i % 7, 3 * i % 7}, None, {i % 5}) for i in range(20)]
    text = slot_table(PoolComparison(pools))
    assert "<=" in text.splitlines()[11]  # 10 of 20 are 184756 choices
    assert "<=" not in text.splitlines()[3]  # 2 of 20 are 190
    assert "too many choices" in text
    assert "too many choices" not in slot_table(PoolComparison(pools[:5]))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 10**6),
)
def test_bytes_are_those_the_flag_turns_into_slots(
    experts: list[int], slots: int, expert_bytes: int
) -> None:
    slots = min(slots, max(experts))
    needed = slab_bytes(slots, experts, expert_bytes)
    assert slots_for_memory(needed, expert_bytes, experts) == slots
    if slots > 1:
        assert slots_for_memory(needed - 1, expert_bytes, experts) == slots - 1


def test_many_pools_take_a_bounded_time() -> None:
    pools = [
        a_pool(f"p{i}", *({(i * j + layer * 7) % 128 for j in range(16)} for layer in range(16)))
        for i in range(40)
    ]
    start = time.process_time()
    PoolComparison(pools).subset_needs()
    assert time.process_time() - start < 20  # all 2**40 choices would take for ever


# -- text --


def test_the_text_says_which_pools_and_layers() -> None:
    lines = describe_comparison(PoolComparison([MATH, CODE, LAW]), (7, 5), 2**20).splitlines()
    assert lines[0] == "3 pools, 2 MoE layers, 2-4 of 5-7 experts per layer"
    assert "law   0.33  0.21  -" in lines
    assert "most similar: math and code, 0.67 (layers 0.33 to 1.00)" in lines
    assert "least similar: code and law, 0.21 (layers 0.17 to 0.25)" in lines
    at = next(index for index, line in enumerate(lines) if line.startswith("LAYER"))
    assert lines[at + 2].split() == ["2", "5", "4", "1", "0.50", "0.25", "1.00"]
    table = [line.split() for line in lines if line[:1].isdigit()][-3:]
    assert table[0] == ["1", "4", "8.0", "3", "6.0", "law"]
    assert table[1][:5] == ["2", "6", "11.0", "5", "10.0"]
    assert table[2] == ["3", "7", "12.0", "7", "12.0", "all"]
    assert lines[-1].startswith(f"all together: --expert-slots 7, or --expert-memory {12 * 2**20} ")


def test_a_wide_matrix_is_left_to_the_picture() -> None:
    pools = [a_pool(f"p{i}", {i % 7}, None, {i % 5}) for i in range(17)]
    assert "17 pools are too many for a table" in describe_comparison(PoolComparison(pools))
