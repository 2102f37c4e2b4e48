"""Facts of the families that vLLM has a class for, and what is refused, by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emo_serve.errors import ConfigError
from emo_serve.facts import ExpertNames, MoeLayer
from emo_serve.families.opening import facts_of_config, open_checkpoint
from emo_serve.families.standard import FAMILIES, facts_of
from emo_serve.vllm_plugin import ARCHITECTURES

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 4,
    "num_experts": 16,
}
QWEN3 = {**SIZES, "moe_intermediate_size": 32, "norm_topk_prob": True}
MIXTRAL = {**SIZES, "num_local_experts": 8}
del MIXTRAL["num_experts"]
FIELDS = {"olmoe": SIZES, "flex_olmo": SIZES, "qwen3_moe": QWEN3, "mixtral": MIXTRAL}


def facts(model_type: str, **changes: Any) -> Any:
    return facts_of(FAMILIES[model_type], {**FIELDS[model_type], **changes})


def test_each_family_keeps_its_fields_in_its_own_place() -> None:
    moe = MoeLayer(16, 0, (), 4)
    for model_type in ("olmoe", "flex_olmo"):
        found = facts(model_type)
        assert (found.moe_layers, found.expert_width) == ((moe,) * 4, 96)
        assert not found.norm_topk_prob and facts(model_type, norm_topk_prob=True).norm_topk_prob
    qwen3 = facts("qwen3_moe")
    assert (qwen3.expert_width, qwen3.norm_topk_prob) == (32, True)
    mixtral = facts("mixtral")
    assert mixtral.moe_layers == (MoeLayer(8, 0, (), 4),) * 4
    assert mixtral.norm_topk_prob and mixtral.names.block == "block_sparse_moe"
    assert not any(facts(name).has_reference for name in FIELDS)


def test_a_count_of_experts_has_either_name() -> None:
    renamed = {**QWEN3, "num_local_experts": QWEN3["num_experts"]}
    del renamed["num_experts"]
    assert facts_of(FAMILIES["qwen3_moe"], renamed) == facts("qwen3_moe")


def test_a_token_takes_no_more_experts_than_there_are() -> None:
    assert facts("flex_olmo", num_experts=7, num_experts_per_tok=7).moe_layers[0].top_k == 7
    assert facts("mixtral", num_local_experts=2).moe_layers[0].top_k == 2


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, (16, 16, 16, 16)),
        ({"mlp_only_layers": [0, 3]}, (0, 16, 16, 0)),
        ({"decoder_sparse_step": 2}, (0, 16, 0, 16)),
    ],
)
def test_dense_layers_of_qwen3(changes: dict[str, Any], counts: tuple[int, ...]) -> None:
    assert facts("qwen3_moe", **changes).experts_per_layer == counts


def test_the_plugin_has_a_model_for_each_family() -> None:
    ours = {family.architecture for family in FAMILIES.values()}
    assert ours <= set(ARCHITECTURES)
    assert all(name.startswith("EmoServe") for name in ours), "names that vLLM does not have"


@pytest.mark.parametrize("names", [ExpertNames(), FAMILIES["mixtral"].names])
def test_names_of_experts_are_read_as_they_are_written(names: ExpertNames) -> None:
    for matrix in ("gate", "up", "down"):
        assert names.parse(names.expert(3, 17, matrix)) == (3, 17, matrix)
    assert names.parse(names.router(3)) is None
    assert names.parse(f"model.layers.3.{names.block}.experts.1.{names.gate}.bias") is None
    assert FAMILIES["mixtral"].names.expert(0, 2, "down") == (
        "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    )


# -- refused, by field --


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid': only routers with softmax"),
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc': scores with a correction bias"),
        ({"use_routing_bias": True}, "use_routing_bias is True: scores with a correction bias"),
        ({"n_group": 8}, "n_group is 8: experts in groups"),
        ({"topk_group": 4}, "topk_group is 4: experts in groups"),
        ({"moe_bias": True}, "moe_bias is True: experts with biases"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64: shared"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5: scaled"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*quantised"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"num_experts": 0}, "num_experts is 0; expected an integer of at least 1"),
        ({"num_experts_per_tok": "4"}, "num_experts_per_tok is '4'; expected an integer"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0; expected None of OLMoE"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; expected 1e-05 of OLMoE"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; expected False of OLMoE"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        facts("olmoe", **changes)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_biases_that_vllm_would_drop_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match="attention_bias is True; expected False of"):
        facts(model_type, attention_bias=True)
    assert facts("flex_olmo", attention_bias=True) == facts("flex_olmo")


def test_no_expert_in_any_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer has experts.*decoder_sparse_step is 9"):
        facts("qwen3_moe", decoder_sparse_step=9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the models served are emo, .*mixtral"),
        ({"model_type": None}, "model_type is None; the models served are"),
        ({"model_type": ["olmoe"]}, r"model_type is \['olmoe'\]; the models served are"),
        ({"model_type": "glm4_moe", "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"model_type": "deepseek_v3", "n_group": 8}, "n_group is 8: experts in groups"),
        ({"model_type": "olmoe", "num_experts": "many"}, "num_experts"),
    ],
)
def test_other_models_are_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=words) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_config_of_other_code_is_refused() -> None:
    class Other:
        model_type = "llama"

    with pytest.raises(
        ConfigError, match="loaded as Other, model_type 'llama', from .* code; expected emo"
    ):
        facts_of_config(Other())
