"""The routing record against what emo.routing says of each token, one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.emo.routing import route, router_probabilities
from emo_serve.facts import MoeLayer
from emo_serve.vllm_plugin.contract import MASS_SLOTS, NO_ACCOUNT, NO_MASS_SLOT, RequestTag
from emo_serve.vllm_plugin.routing_record import (
    PoolKey,
    RoutedLayer,
    RoutingRecord,
    StepRequests,
    pool_key,
)

LAYERS = {
    0: MoeLayer(num_experts=6, num_shared_experts=1, always_active=(), top_k=3),
    2: MoeLayer(num_experts=5, num_shared_experts=0, always_active=(1,), top_k=2),
    3: MoeLayer(num_experts=2, num_shared_experts=2, always_active=(), top_k=2),
    4: MoeLayer(num_experts=6, num_shared_experts=1, always_active=(), top_k=3),  # like the first
}
NUM_ROWS, MAX_TOKENS = 3, 40


@dataclass
class Twin:
    """A record, and the same sums made the plain way."""

    record: RoutingRecord
    tables: dict[int, torch.Tensor]
    temperatures: torch.Tensor
    coverage: dict[int, list[float]] = field(default_factory=dict)
    mass: dict[int, list[dict[int, torch.Tensor]]] = field(default_factory=dict)
    usage: dict[PoolKey, list[dict[int, torch.Tensor]]] = field(default_factory=dict)
    keys: dict[int, PoolKey] = field(default_factory=dict)

    def publish(self, row: int, seed: int) -> None:
        """Give a row a pool drawn from a seed, as the model does."""
        generator = torch.Generator().manual_seed(seed)
        temperature = 0.5 + seed % 3
        ids: list[list[int]] = [[], [], [], [], []]
        masks = {}
        for index, moe in LAYERS.items():
            mask = torch.rand(moe.num_experts, generator=generator) < 0.6
            mask[list(moe.implied)] = True
            masks[index], ids[index] = mask, mask.nonzero().flatten().tolist()
        self.record.rebind(row, pool_key(ids, temperature))
        self.keys[row] = pool_key(ids, temperature)
        for index, mask in masks.items():
            self.tables[index][row] = mask
        self.temperatures[row] = temperature

    def step(
        self,
        tags: list[RequestTag],
        lengths: list[int],
        seed: int,
        padding: int = 0,
        rejected: list[int] | None = None,
    ) -> None:
        """Route tokens as a step of the engine would, the last `rejected` ones as vain drafts."""
        generator = torch.Generator().manual_seed(seed)
        num_tokens = sum(lengths)
        self.record.begin(StepRequests(tags, np.array(lengths), num_tokens))
        logits = {
            index: torch.randn(num_tokens + padding, moe.num_experts, generator=generator) * 2
            for index, moe in LAYERS.items()
        }
        for index, record in self.record.of_layer.items():
            record.note(logits[index])
        if rejected is not None:
            self.record.reject(torch.tensor(rejected))
        kept = [length - r for length, r in zip(lengths, rejected or [0] * len(tags), strict=True)]
        of_token = [
            tag if place < count else None
            for tag, length, count in zip(tags, lengths, kept, strict=True)
            for place in range(length)
        ]
        for token, tag in enumerate(of_token):
            if tag is None:
                continue
            self._note({index: each[token, None] for index, each in logits.items()}, tag)

    def _note(self, logits: dict[int, torch.Tensor], tag: RequestTag) -> None:
        shares, masses, taken = [], {}, {}
        for index, moe in LAYERS.items():
            pool_1E = self.tables[index][tag.row][None]
            probabilities = router_probabilities(logits[index], moe)[0]
            num_standard = moe.num_experts - (0 if moe.always_active else moe.num_shared_experts)
            if num_standard:
                inside = probabilities[:num_standard][pool_1E[0, :num_standard]]
                shares.append(float(inside.sum()))
            temperature = float(self.temperatures[tag.row])
            routing = route(logits[index], moe, pool_1E, temperature)
            taken[index] = torch.zeros(moe.num_experts, dtype=torch.int64)
            taken[index][routing.experts_TK[routing.weights_TK != 0]] = 1
            masses[index] = probabilities.double()
        self.coverage.setdefault(tag.account, []).append(sum(shares) / len(shares))
        self.mass.setdefault(tag.mass_slot, []).append(masses)
        if tag.mass_slot == NO_MASS_SLOT:
            self.usage.setdefault(self.keys[tag.row], []).append(taken)

    def check(self) -> None:
        """Ask for everything."""
        self.coverage.pop(NO_ACCOUNT, None)
        found = {account: (mass, tokens) for account, mass, tokens in self.record.read_coverage()}
        expected = {account: (sum(s), len(s)) for account, s in self.coverage.items()}
        assert found.keys() == expected.keys()
        for account, (mass, tokens) in found.items():
            assert mass == pytest.approx(expected[account][0], abs=1e-5 * tokens)
            assert tokens == expected[account][1]
        self.coverage.clear()
        for slot in range(MASS_SLOTS):
            per_token = self.mass.pop(slot, [])
            tokens, masses = self.record.read_mass(slot)
            assert tokens == len(per_token)
            for index, moe in LAYERS.items():
                total = sum((m[index] for m in per_token), torch.zeros(moe.num_experts).double())
                assert masses[index] == pytest.approx(total.tolist(), abs=1e-6)
        for key, per_token in self.usage.items():
            tokens, counts = self.record.usage(key)
            assert tokens == len(per_token)
            for index in LAYERS:
                assert counts[index] == sum(taken[index] for taken in per_token).tolist()


def twin() -> Twin:
    tables = {i: torch.zeros(NUM_ROWS, m.num_experts, dtype=torch.bool) for i, m in LAYERS.items()}
    temperatures = torch.ones(NUM_ROWS)
    layers = {i: RoutedLayer(moe, tables[i]) for i, moe in LAYERS.items()}
    record = RoutingRecord(layers, MAX_TOKENS, torch.float32)
    made = Twin(record, tables, temperatures)
    for row in range(NUM_ROWS):
        made.publish(row, row)
    return made


tags = st.builds(
    RequestTag,
    row=st.integers(0, NUM_ROWS - 1),
    account=st.sampled_from([NO_ACCOUNT, 1, 2, 2**40]),
    mass_slot=st.sampled_from([NO_MASS_SLOT, 0, MASS_SLOTS - 1]),
)
steps = st.tuples(
    st.just("step"),
    st.lists(st.tuples(tags, st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(0, 5),
)
publications = st.tuples(st.just("publish"), st.integers(0, NUM_ROWS - 1), st.integers(0, 4))
others = st.tuples(st.sampled_from(["check", "pause", "count"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(steps, steps, publications, others), max_size=25))
def test_it_counts_what_was_routed(operations: list[tuple]) -> None:  # type: ignore[type-arg]
    made = twin()
    made.record.capacity = 60  # so that it is full now and then; there is room for more
    for number, (what, *arguments) in enumerate(operations):
        if what == "step":
            requests, padding = arguments
            lengths = [length for _, length, _ in requests]
            padding = min(padding, MAX_TOKENS - sum(lengths))
            vain = [min(drafts, length - 1) for _, length, drafts in requests]
            made.step([tag for tag, *_ in requests], lengths, number, padding, rejected=vain)
        elif what == "publish":
            made.publish(*arguments)
        elif what == "check":
            made.check()
        elif what == "count":
            made.record.count()
        else:  # a dummy run, as long as vLLM likes
            made.record.pause()
            for index, record in made.record.of_layer.items():
                record.note(torch.full((MAX_TOKENS, LAYERS[index].num_experts), 9.0))
    made.check()


def test_rejected_drafts_are_in_no_sum() -> None:
    made = twin()
    requests = [RequestTag(0, 1), RequestTag(1, 2, 0), RequestTag(2, 3)]
    made.step(requests, [4, 4, 1], seed=0, rejected=[3, 0, 0])
    made.step(requests, [1, 2, 2], seed=1)
    made.step(requests, [3, 3, 3], seed=2, rejected=[0, 2, 1])
    assert [len(shares) for shares in made.coverage.values()] == [5, 7, 5]
    made.check()
    made.record.reject(torch.tensor([1, 1, 1]))  # of a step that is counted already
    made.step(requests, [2, 2, 2], seed=3)
    made.check()


def test_a_full_record_is_counted_and_the_next_step_is_not_lost() -> None:
    made = twin()
    request = RequestTag(0, account=7)
    steps = made.record.capacity // MAX_TOKENS + 3
    for seed in range(steps):
        made.step([request], [MAX_TOKENS], seed)
    ((account, mass, tokens),) = made.record.read_coverage()
    assert (account, tokens) == (7, steps * MAX_TOKENS)
    assert mass == pytest.approx(sum(made.coverage[7]), rel=1e-5)
    assert made.record.read_coverage() == []


def test_half_precision_logits_are_kept_as_they_were_routed() -> None:
    moe = LAYERS[0]
    table = torch.tensor([[True, False, True, False, False, True]])
    layers = {0: RoutedLayer(moe, table)}
    record = RoutingRecord(layers, 4, torch.bfloat16)
    record.rebind(0, pool_key([[0, 2, 5]], 1.0))
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    record.begin(StepRequests([RequestTag(0, 1)], np.array([2]), 2))
    record.of_layer[0].note(logits)
    ((_, mass, _),) = record.read_coverage()
    share = router_probabilities(logits, moe)[:, [0, 2]].sum()
    assert mass == pytest.approx(float(share), abs=1e-6)


def test_the_usage_of_a_pool_outlives_its_row() -> None:
    made = twin()
    made.step([RequestTag(1)], [5], seed=0)
    key = made.keys[1]
    made.publish(1, 4)
    assert made.record.usage(key)[0] == 5
    made.publish(2, 1)  # the first pool again, in another row
    made.step([RequestTag(2)], [3], seed=1)
    made.check()
    assert made.record.usage(key)[0] == 8


def test_usage_of_the_latest_pools_without_a_row_is_kept() -> None:
    moe = MoeLayer(num_experts=6, num_shared_experts=1, always_active=(), top_k=3)
    table = torch.ones(1, 6, dtype=torch.bool)
    record = RoutingRecord({0: RoutedLayer(moe, table)}, 4, torch.float32)
    keys = [pool_key([range(6)], 1.0 + number) for number in range(258)]

    def use(key: PoolKey) -> None:
        record.rebind(0, key)
        record.begin(StepRequests([RequestTag(0)], np.array([2]), 2))
        record.of_layer[0].note(torch.zeros(2, 6))

    for key in keys:
        use(key)
    assert [record.usage(key)[0] for key in keys] == [0] + [2] * 257
    use(keys[2])
    use(keys[0])
    record.rebind(0, keys[1])
    assert [record.usage(key)[0] for key in keys] == [2, 0, 4, 0] + [2] * 254


def test_usage_of_many_tokens_is_estimated_from_some_of_each_pool() -> None:
    moe = MoeLayer(num_experts=6, num_shared_experts=1, always_active=(), top_k=3)
    table = torch.ones(3, 6, dtype=torch.bool)
    table[1, 0] = False
    record = RoutingRecord({0: RoutedLayer(moe, table)}, 2000, torch.float32)
    keys = [pool_key([kept], 1.0) for kept in ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [4])]
    for row, key in enumerate(keys):
        record.rebind(row, key)
    tags = [RequestTag(0, 1), RequestTag(1, 2), RequestTag(0, 1), RequestTag(2)]
    record.begin(StepRequests(tags, np.array([1400, 101, 496, 3]), 2000))
    logits_TE = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]).repeat(2000, 1)
    logits_TE[:948, 3] = 6.0  # half of the first pool's tokens
    record.of_layer[0].note(logits_TE)
    tokens, counts = record.usage(keys[0])
    assert tokens == 1896
    assert [counts[0][expert] for expert in (0, 2, 4, 5)] == [1896, 0, 0, 1896]
    assert counts[0][1] + counts[0][3] == 1896
    assert counts[0][3] == pytest.approx(948, rel=0.25)
    assert record.usage(keys[1]) == (101, {0: [0, 101, 101, 0, 0, 101]})
    assert record.usage(keys[2]) == (3, {0: [3, 3, 0, 0, 0, 3]}), "a few tokens are counted whole"
    coverages = {account: (mass, tokens) for account, mass, tokens in record.read_coverage()}
    assert coverages[1] == (pytest.approx(1896, rel=1e-5), 1896), "coverage is of every token"
    assert coverages[2][1] == 101


def test_long_steps_are_counted_in_parts() -> None:
    made = twin()
    made.record = RoutingRecord(
        {i: RoutedLayer(moe, made.tables[i]) for i, moe in LAYERS.items()}, 5000, torch.float32
    )
    for row, key in made.keys.items():
        made.record.rebind(row, key)
    requests = [RequestTag(0, 1, 0), RequestTag(1, 2), RequestTag(2, 3, 1)]
    made.step(requests, [2040, 20, 40], seed=0)
    made.usage.clear()  # an estimate, with so many
    made.check()


def test_a_request_without_tokens_adds_nothing() -> None:
    made = twin()
    made.step([RequestTag(0, 1), RequestTag(1, 2), RequestTag(2, 3)], [0, 2, 0], seed=0)
    assert [(account, tokens) for account, _, tokens in made.record.read_coverage() if tokens] == [
        (2, 2)
    ]
