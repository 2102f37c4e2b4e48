"""SlotTable: examples for each promise, and a state machine against a naive dictionary."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from emo_serve.errors import ConfigError
from emo_serve.residency.slots import Copy, ExpertIds, LayerSlots, SlotTable
from tests.support.residency_world import PROFILE

EXPERTS = (6, 0, 4)  # the second layer is dense
SLOTS = 5  # so the third layer holds everything


def load(
    table: SlotTable, key: str, expert_ids: ExpertIds, evictions: tuple[str, ...] = ()
) -> tuple[Copy, ...]:
    plan = table.plan_load(key, expert_ids, evictions)
    table.begin(plan)
    table.finish(key)
    table.check_integrity()
    return plan.copies


def slots_held_alone(table: SlotTable, key: str) -> int:
    """Count the slots that would be free without this pool."""
    return table.slots_of(table.keys) - table.slots_of(table.keys - {key})


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(EXPERTS, SLOTS)


# -- examples --


def test_a_load_copies_only_what_is_missing(table: SlotTable) -> None:
    first = load(table, "a", [[0, 4], [], [1]])
    assert first == (Copy(0, 0, 0), Copy(0, 4, 1), Copy(2, 1, 0))
    assert load(table, "b", [[4, 5], [], [1, 2]]) == (Copy(0, 5, 2), Copy(2, 2, 1))
    assert load(table, "c", [[0, 5], [], [1]]) == ()


def test_an_eviction_frees_only_what_no_other_pool_uses(table: SlotTable) -> None:
    load(table, "a", [[0, 4], [], [1]])
    load(table, "b", [[4, 5], [], [1]])
    assert table.evict("a") == (Copy(0, 0, 0),)
    assert table.covers_bits(table.bits([[4, 5], [], [1]]))
    assert not table.covers_bits(table.bits([[0], [], []]))
    assert table.evict("b") == (Copy(0, 4, 1), Copy(0, 5, 2), Copy(2, 1, 0))
    table.check_integrity()
    assert table.usage() == SlotTable(EXPERTS, SLOTS).usage()


def test_planning_changes_nothing(table: SlotTable) -> None:
    before = table.usage()
    table.plan_load("a", [[0], [], [0]])
    assert table.usage() == before
    assert table.keys == frozenset()


def test_what_is_loading_is_neither_free_nor_resident(table: SlotTable) -> None:
    table.begin(table.plan_load("a", [[2, 3], [], []]))
    assert table.usage()[0] == LayerSlots(slots=5, free=3, resident=0, loading=2)
    assert table.slot_of(0, 2) is None
    assert not table.covers_bits(table.bits([[2], [], []]))
    assert [table.slot_of(0, expert) for expert in (2, 5)] == [None, None]
    table.finish("a")
    assert table.usage()[0] == LayerSlots(slots=5, free=3, resident=2, loading=0)
    assert table.slot_of(0, 2) == 0


def test_an_abandoned_load_never_happened(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], []])
    before = table.usage()
    table.begin(table.plan_load("b", [[1, 2, 3], [], [0]]))
    table.abandon("b")
    table.check_integrity()
    assert table.usage() == before
    assert table.keys == {"a"}
    assert table.covers_bits(table.bits([[0, 1], [], []]))
    assert load(table, "c", [[5], [], []]) == (Copy(0, 5, 2),)


def test_a_load_keeps_what_it_shares_when_the_other_pool_goes(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], []])
    table.begin(table.plan_load("b", [[1, 2], [], []]))
    assert table.evict("a") == (Copy(0, 0, 0),)
    table.finish("b")
    assert table.covers_bits(table.bits([[1, 2], [], []]))
    table.check_integrity()


def test_a_load_in_the_place_of_others_keeps_what_it_needs_of_theirs(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], [0]])
    load(table, "b", [[2, 3], [], [1]])
    load(table, "union", [[0, 2], [], []])
    copies = load(table, "c", [[1, 4, 5], [], [1, 2]], ("a", "b"))
    assert copies == (Copy(0, 4, 3), Copy(0, 5, 4), Copy(2, 2, 0))  # 0 and 2 are the union's
    assert table.keys == {"union", "c"}
    assert [layer.free for layer in table.usage()] == [0, 0, 2]


def test_evictions_happen_when_a_load_begins_and_are_not_undone(table: SlotTable) -> None:
    load(table, "a", [[0, 1, 2, 3], [], []])
    plan = table.plan_load("b", [[3, 4, 5], [], []], ("a",))
    assert plan.evictions == ("a",)
    assert table.keys == {"a"}
    table.begin(plan)
    table.check_integrity()
    assert table.usage()[0] == LayerSlots(slots=5, free=2, resident=1, loading=2)
    table.abandon("b")
    table.check_integrity()
    assert table.usage() == SlotTable(EXPERTS, SLOTS).usage()


def test_what_fits_is_a_question_of_each_layers_union(table: SlotTable) -> None:
    load(table, "a", [[0, 1, 2], [], [0]])
    load(table, "b", [[2, 3], [], [1]])
    assert table.fits([[4], [], []])
    assert not table.fits([[4, 5], [], []])
    assert not table.fits([[4], [], []], [[5], [], []])
    assert table.fits([[4, 5], [], []], without=("b",))
    assert table.fits([[0, 1, 2, 3], [], [0, 1, 2, 3]], [[4], [], []])
    assert not table.fits([[4, 5, 3], [], []], without=("b",))
    assert table.fits([[0, 3, 4, 5], [], []], without=("a", "b"))


def test_a_load_under_way_counts_as_there(table: SlotTable) -> None:
    table.begin(table.plan_load("a", [[0, 1, 2], [], []]))
    assert not table.fits([[3, 4, 5], [], []])
    assert table.slots_of(["a"]) == 3
    assert not table.covers_bits(table.bits([[0], [], []]))


def test_shared_slots_count_once(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], [0]])
    load(table, "b", [[1, 2], [], [0]])
    assert table.slots_of(["a"]) == 3
    assert table.slots_of(["a", "b"]) == table.slots_of(["b", "a", "a"]) == 4
    assert table.slots_of([]) == 0
    assert (slots_held_alone(table, "a"), slots_held_alone(table, "b")) == (1, 1)
    load(table, "union", [[0, 1, 2], [], [0]])
    assert (slots_held_alone(table, "a"), slots_held_alone(table, "union")) == (0, 0)


def test_of_pools_that_cover_each_other_one_is_redundant(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], []])
    load(table, "hot", [[0, 1], [], []])
    load(table, "b", [[2], [], []])
    assert table.redundant(["a", "b", "hot"]) == {"a"}
    assert table.redundant(["hot", "b", "a"]) == {"hot"}
    assert table.redundant(["a", "b"]) == {"a"}  # hot stays where it is
    load(table, "union", [[0, 1, 2], [], []])
    assert table.redundant(["union", "a", "hot", "b"]) == {"union", "a"}
    assert table.redundant(["a", "b", "hot", "union"]) == {"a", "b", "hot"}
    assert table.redundant([]) == set()


def test_sets_of_experts_are_numbers(table: SlotTable) -> None:
    bits = table.bits([[0, 5], [], [3]])
    assert bits.bit_count() == 3
    assert bits == table.bits([[5, 0], [], [3]])
    assert bits & table.bits([[1, 2], [], [0, 1, 2]]) == 0
    assert table.can_hold(bits) and not table.can_hold(table.bits([range(6), [], []]))
    assert not table.covers_bits(bits)
    load(table, "a", [[0, 5], [], [3]])
    assert table.covers_bits(bits) and table.covers_bits(0)
    assert table.held_by(["a"]) == bits
    with pytest.raises(AssertionError, match="does not have"):
        table.bits([[6], [], []])
    with pytest.raises(AssertionError, match="does not have"):
        table.bits([[], [0], []])


def test_needs_are_counted_by_layer(table: SlotTable) -> None:
    load(table, "a", [[0, 1, 2], [], []])
    first, dense, _ = table.needs([[2, 3, 4, 5], [], [0]])
    assert (first.needed, first.missing, first.free, first.slots) == (4, 3, 2, 5)
    assert (dense.needed, dense.missing, dense.free, dense.slots) == (0, 0, 0, 0)


def test_a_layer_has_no_more_slots_than_experts(table: SlotTable) -> None:
    assert [layer.slots for layer in table.usage()] == [5, 0, 4]
    assert table.experts_per_layer == EXPERTS


def test_a_table_without_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots a layer is 0; expected at least 1"):
        SlotTable(EXPERTS, 0)


def test_misuse_is_caught(table: SlotTable) -> None:
    plan = table.plan_load("a", [[0], [], []])
    load(table, "b", [[0], [], []])
    with pytest.raises(AssertionError, match="changed since"):
        table.begin(plan)
    with pytest.raises(AssertionError, match="holds its slots already"):
        table.plan_load("b", [[0], [], []])
    with pytest.raises(AssertionError, match="too few free slots"):
        table.plan_load("c", [range(6), [], []])
    table.begin(table.plan_load("d", [[1], [], []]))
    with pytest.raises(AssertionError, match="still loading"):
        table.plan_load("e", [[1], [], []])
    with pytest.raises(AssertionError, match="is loading"):
        table.evict("d")


def test_the_self_check_sees_a_wrong_account(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], []])
    table._layers[0].slot_of[1] = 2
    with pytest.raises(AssertionError):
        table.check_integrity()


# -- against a naive model --

id_lists = st.tuples(
    *(
        st.lists(st.integers(0, num_experts - 1), unique=True, max_size=num_experts)
        if num_experts
        else st.just([])
        for num_experts in EXPERTS
    )
)


class Tables(RuleBasedStateMachine):
    """Drive a table and, beside it, one flat dictionary of which expert should be where."""

    resident = Bundle("resident")
    under_way = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(EXPERTS, SLOTS)
        self.where: dict[tuple[int, int], int] = {}
        self.pools: dict[str, set[tuple[int, int]]] = {}
        self.loading: dict[str, set[tuple[int, int]]] = {}
        self.names = map(str, itertools.count())

    def start(self, expert_ids: ExpertIds, evictions: tuple[str, ...] = ()) -> str | None:
        """Begin a load if the model says it fits, and check that the table agrees."""
        wanted = {(layer, e) for layer, ids in enumerate(expert_ids) for e in ids}
        if wanted & self.on_the_way():
            return None
        staying = self.places(key for key in self.pools if key not in evictions)
        room = [min(SLOTS, count) for count in EXPERTS]
        fits = all(
            sum(at == layer for at, _ in wanted | staying) <= room[layer]
            for layer in range(len(EXPERTS))
        )
        assert fits == self.table.fits(expert_ids, without=evictions)
        if not evictions:
            assert fits == all(need.missing <= need.free for need in self.table.needs(expert_ids))
        if not fits:
            return None
        key = next(self.names)
        plan = self.table.plan_load(key, expert_ids, evictions)
        assert {(copy.layer, copy.expert) for copy in plan.copies} == wanted - self.where.keys()
        self.table.begin(plan)
        for victim in evictions:
            del self.pools[victim]
        for place in self.where.keys() - staying - wanted:
            del self.where[place]
        taken = {(layer, slot) for (layer, _), slot in self.where.items()}
        assert not taken & {(copy.layer, copy.slot) for copy in plan.copies}
        new = {(copy.layer, copy.expert): copy.slot for copy in plan.copies}
        self.where |= new
        self.pools[key], self.loading[key] = wanted, set(new)
        return key

    def places(self, keys: Iterable[str]) -> set[tuple[int, int]]:
        return {place for key in keys for place in self.pools[key]}

    def undo(self, key: str) -> None:
        self.table.abandon(key)
        del self.loading[key]
        self.drop(key)

    def drop(self, key: str) -> set[tuple[int, int]]:
        gone = self.pools.pop(key) - self.places(self.pools)
        for place in gone:
            del self.where[place]
        return gone

    def on_the_way(self) -> set[tuple[int, int]]:
        return {place for held in self.loading.values() for place in held}

    @rule(target=under_way, expert_ids=id_lists)
    def begin(self, expert_ids: ExpertIds) -> object:
        key = self.start(expert_ids)
        return multiple() if key is None else key

    @rule(target=under_way, expert_ids=id_lists, victims=st.lists(consumes(resident), max_size=3))
    def replace(self, expert_ids: ExpertIds, victims: list[str]) -> object:
        """Load in the place of others; a victim that is not needed any more goes all the same."""
        key = self.start(expert_ids, tuple(victims))
        if key is None:
            for victim in victims:
                self.table.evict(victim)
                self.drop(victim)
        return multiple() if key is None else key

    @rule(target=resident, key=consumes(under_way))
    def finish(self, key: str) -> str:
        self.table.finish(key)
        del self.loading[key]
        return key

    @rule(key=consumes(under_way))
    def abandon(self, key: str) -> None:
        self.undo(key)

    @rule(expert_ids=id_lists)
    def fail_at_once(self, expert_ids: ExpertIds) -> None:
        before = self.table.usage(), dict(self.where), self.table.keys
        key = self.start(expert_ids)
        if key is not None:
            self.undo(key)
        assert (self.table.usage(), self.where, self.table.keys) == before

    @rule(key=consumes(resident))
    def evict(self, key: str) -> None:
        freed = {(copy.layer, copy.expert): copy.slot for copy in self.table.evict(key)}
        expected = dict(self.where)
        assert freed == {place: expected[place] for place in self.drop(key)}

    @precondition(lambda self: self.pools)
    @rule(target=resident, data=st.data())
    def unite(self, data: st.DataObject) -> object:
        """Hold a union of resident pools: nothing to copy."""
        settled = sorted(self.pools.keys() - self.loading.keys())
        if not settled:
            return multiple()
        chosen = data.draw(st.sets(st.sampled_from(settled), min_size=1, max_size=3))
        places = self.places(chosen)
        ids = [sorted(e for at, e in places if at == layer) for layer in range(len(EXPERTS))]
        assert self.table.covers_bits(self.table.bits(ids))
        key = self.start(ids)
        assert key is not None
        assert not self.loading.pop(key)
        return key

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.table.check_integrity()
        assert self.table.keys == self.pools.keys()
        loading = self.on_the_way()
        for layer, num_experts in enumerate(EXPERTS):
            for expert in range(num_experts):
                expected = None if (layer, expert) in loading else self.where.get((layer, expert))
                assert self.table.slot_of(layer, expert) == expected
        for layer, usage in enumerate(self.table.usage()):
            assert usage.slots == usage.free + usage.resident + usage.loading
            assert usage.loading == sum(place[0] == layer for place in loading)
            assert usage.resident + usage.loading == sum(at == layer for at, _ in self.where)
        assert self.table.slots_of(self.pools) == len(self.where)
        for key, held in self.pools.items():
            alone = held - self.places(self.pools.keys() - {key})
            assert slots_held_alone(self.table, key) == len(alone)
        order = sorted(self.pools.keys() - self.loading.keys())
        redundant = self.table.redundant(order)
        assert self.places(self.pools.keys() - redundant) == self.where.keys()
        for index, key in enumerate(order):  # each that stays is needed, given those before it
            others = self.pools.keys() - {*redundant.intersection(order[:index]), key}
            assert (key in redundant) == (self.pools[key] <= self.places(others))


TestTables = Tables.TestCase
TestTables.settings = PROFILE


def test_a_map_shows_every_slot_with_who_refers_to_it(table: SlotTable) -> None:
    load(table, "a", [[0, 1], [], [0]])
    table.begin(table.plan_load("b", [[1, 2], [], []]))
    first, dense, last = table.layer_maps(["a", "b"])
    assert first.experts == (0, 1, 2, None, None)
    assert first.holders == ((0,), (0, 1), (1,), (), ())
    assert first.loading == (2,)
    assert dense.experts == ()
    assert last.holders[0] == (0,)
    table.finish("b")
    assert table.layer_maps(["b", "a"])[0].holders[1] == (0, 1)
    assert table.layer_maps(["b", "a"])[0].loading == ()


def test_the_version_grows_with_every_change(table: SlotTable) -> None:
    versions = [table.version]
    plan = table.plan_load("a", [[0], [], []])
    assert table.version == versions[0]
    for change in (lambda: table.begin(plan), lambda: table.finish("a"), lambda: table.evict("a")):
        change()
        versions.append(table.version)
    assert versions == sorted(set(versions))
