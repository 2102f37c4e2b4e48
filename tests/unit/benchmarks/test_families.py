"""The pools that the check of model families asks for."""

from __future__ import annotations

import pytest

from benchmarks.families.models import MODELS
from benchmarks.families.oracle import others_of, pools_of

MOE = [family for family, model in MODELS.items() if model.experts]


@pytest.mark.parametrize("family", MOE)
def test_pools_fill_the_slots_and_share_experts(family: str) -> None:
    model, pools, others = MODELS[family], pools_of(family), others_of(family)
    for index, (a, b, c, rest) in enumerate(zip(*pools.values(), others, strict=True)):
        if index in model.dense_layers:
            assert (a, b, c, rest) == ([], [], [], [])
            continue
        assert (len(a), len(b), len(c)) == model.pool_sizes
        assert len({*a, *b, *c}) == model.slots < model.num_experts
        assert sorted({*a, *b, *c, *rest}) == list(range(model.num_experts))
        assert {*a} & {*b} and not {*rest} & {*a, *b, *c}


def test_the_dense_model_has_the_base_pool_alone() -> None:
    assert pools_of("dense") == {"base": [[], [], []]}
