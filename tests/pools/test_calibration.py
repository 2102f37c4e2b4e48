"""Router scores against sums made by hand, and the pools they give."""

from __future__ import annotations

import pytest
import torch

from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.errors import ConfigError
from emo_serve.pools.calibration import pool_from_scores, router_pool, router_scores


def _model(**fields: object) -> EmoForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 2, "num_experts": 6, "num_experts_per_tok": 3}
    shape |= {"pad_token_id": None, "eos_token_id": 0, "max_position_embeddings": 64}
    return EmoForCausalLM(EmoConfig(**{**shape, **fields})).eval()


DOCUMENTS = [torch.arange(1, 20), torch.arange(20, 27)]


def test_scores_are_the_mean_softmax_over_all_tokens() -> None:
    model = _model(num_shared_experts=1)
    scores = router_scores(model, DOCUMENTS)
    record: list[RouterRecord] = []
    with torch.no_grad():
        for ids_T in DOCUMENTS:
            model(ids_T[None], record=record)
    for layer in range(3):
        logits = torch.cat([r.logits_BTE[0] for r in record if r.layer == layer])
        assert len(logits) == 26
        expected = [*logits[:, :5].softmax(-1).mean(0).tolist(), 1.0]
        assert scores[layer] == pytest.approx(expected)


def test_a_layer_without_shared_experts_scores_them_all() -> None:
    for layer in router_scores(_model(num_shared_experts=0), DOCUMENTS):
        assert layer is not None
        assert sum(layer) == pytest.approx(1.0)


def test_always_active_layers_have_one_softmax() -> None:
    scores = router_scores(_model(num_shared_experts=1, always_active_experts=[2]), DOCUMENTS)
    assert [sum(layer or ()) for layer in scores] == pytest.approx([1.0] * 3)
    assert [len(layer or ()) for layer in scores] == [6] * 3


def test_dense_layers_have_no_scores_and_no_experts() -> None:
    model = _model(num_experts_per_layer=[0, 6, 6], dense_intermediate_size=8)
    pool = router_pool("math", model, DOCUMENTS, k=3)
    assert pool.layers[0] is None
    assert [len(experts) for experts in pool.expert_ids] == [0, 3, 3]


def test_the_pool_keeps_the_best_and_all_scores() -> None:
    model = _model(num_shared_experts=1)
    scores = router_scores(model, DOCUMENTS)
    pool = pool_from_scores("math", scores, 3, model)
    for layer, ranking in zip(pool.layers, scores, strict=True):
        assert layer is not None
        assert ranking is not None
        assert layer.scores == ranking
        best = sorted(range(5), key=lambda e: -ranking[e])[:2]
        assert set(layer.experts) == {*best, 5}


def test_the_pool_says_how_it_was_made() -> None:
    calibration = router_pool("math", _model(), DOCUMENTS, k=3).calibration
    assert calibration is not None
    assert vars(calibration) == {"method": "router", "documents": 2, "tokens": 26}


def test_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        router_scores(_model(), [])
