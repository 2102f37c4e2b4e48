"""Routing against the one-token definition in numpy, over every rule and many shapes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.emo.routing import route, taken_experts
from emo_serve.facts import MoeLayer
from tests.support.naive_emo import choose


@st.composite
def cases(draw: st.DrawFn) -> tuple[MoeLayer, bool, list[set[int]], float, int]:
    num_experts = draw(st.integers(2, 12))
    num_shared = draw(st.integers(0, min(3, num_experts)))
    ids = st.integers(0, num_experts - 1)
    always = tuple(sorted(draw(st.sets(ids, max_size=2))))
    forced = len(always) or num_shared
    top_k = draw(st.integers(max(1, forced), num_experts))
    renormalise = not forced and draw(st.booleans())
    pools = draw(st.lists(st.sets(ids), min_size=1, max_size=4))
    temperature = draw(st.sampled_from([0.5, 1.0, 3.0]))
    seed = draw(st.integers(0, 2**16))
    return MoeLayer(num_experts, num_shared, always, top_k), renormalise, pools, temperature, seed


@settings(deadline=None, max_examples=200)
@given(cases())
def test_matches_the_definition(case: tuple[MoeLayer, bool, list[set[int]], float, int]) -> None:
    layer, renormalise, pools, temperature, seed = case
    logits_TE = torch.randn(len(pools), layer.num_experts, generator=torch.manual_seed(seed))
    pool_TE = torch.tensor([[e in pool for e in range(layer.num_experts)] for pool in pools])
    routing = route(logits_TE, layer, pool_TE, temperature, renormalise)
    for token, pool in enumerate(pools):
        expected = choose(
            logits_TE[token].double().numpy(),
            pool,
            layer.num_shared_experts,
            layer.always_active,
            layer.top_k,
            renormalise,
            temperature,
        )
        got = np.zeros(layer.num_experts)
        pairs = zip(routing.experts_TK[token], routing.weights_TK[token], strict=True)
        for expert, weight in pairs:
            got[expert] += float(weight)
        want = np.array([expected.get(e, 0.0) for e in range(layer.num_experts)])
        np.testing.assert_allclose(got, want, atol=1e-6)
    experts_TK, is_taken_TK = taken_experts(logits_TE, layer, pool_TE)
    for token in range(len(pools)):
        taken = routing.experts_TK[token][routing.weights_TK[token] != 0]
        assert sorted(experts_TK[token][is_taken_TK[token]].tolist()) == sorted(taken.tolist())


def test_whole_pool_equals_no_pool() -> None:
    layer = MoeLayer(8, 1, (), 4)
    logits_TE = torch.randn(5, 8, generator=torch.manual_seed(0))
    everything = torch.ones(5, 8, dtype=torch.bool)
    with_mask, without = route(logits_TE, layer, everything), route(logits_TE, layer)
    assert torch.equal(with_mask.weights_TK, without.weights_TK)
    assert torch.equal(with_mask.experts_TK, without.experts_TK)


def test_an_empty_pool_takes_shared_experts_only() -> None:
    layer = MoeLayer(8, 1, (), 4)
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    routing = route(torch.randn(3, 8, generator=torch.manual_seed(0)), layer, nothing)
    assert torch.equal(routing.weights_TK[:, :3], torch.zeros(3, 3))
    assert torch.equal(routing.weights_TK[:, 3], torch.ones(3))
    assert torch.equal(routing.experts_TK[:, 3], torch.full((3,), 7))


def test_temperature_may_differ_by_token() -> None:
    layer = MoeLayer(8, 0, (), 3)
    logits_TE = torch.randn(2, 8, generator=torch.manual_seed(0))
    mixed = route(logits_TE, layer, None, torch.tensor([[1.0], [4.0]]))
    assert torch.equal(mixed.weights_TK[0], route(logits_TE, layer).weights_TK[0])
    assert torch.equal(mixed.weights_TK[1], route(logits_TE, layer, None, 4.0).weights_TK[1])
