"""Our experts in vLLM's factory: while one of our models is built, and never else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import ModelRegistry
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts, MoeLayer
from emo_serve.families.standard import FAMILIES, StandardFamily
from emo_serve.vllm_plugin import register
from emo_serve.vllm_plugin.backends import ReferenceBackend
from emo_serve.vllm_plugin.contract import PluginSettings
from emo_serve.vllm_plugin.seam import PooledRunner, Seam

FACTS = ModelFacts(
    family="OLMoE",
    vocab_size=320,
    hidden_size=64,
    expert_width=32,
    max_position_embeddings=512,
    moe_layers=(MoeLayer(8, 0, (), 2), None, MoeLayer(8, 0, (), 2)),
    norm_topk_prob=False,
)


@pytest.fixture
def seam(one_rank: None) -> Seam:
    return Seam(FACTS, PluginSettings(4, 3), ReferenceBackend(), max_num_tokens=16)


def build(layer: int = 0, **changes: Any) -> Any:
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 32}
    prefix = f"model.layers.{layer}.mlp.experts"
    return FusedMoEFactory(**{**sizes, "renormalize": False, "prefix": prefix, **changes})


def test_a_layer_holds_our_slots_and_none_of_vllms_weights(seam: Seam) -> None:
    with seam.in_place():
        runner = build()
    assert isinstance(runner, PooledRunner)
    assert not list(runner.parameters())
    assert seam.layers[0].num_slots == 4
    assert runner.pool_rows.data_ptr() == seam.rows.data_ptr()
    with pytest.raises(ConfigError, match=r"experts of layers \[2\] by itself"):
        seam.check_complete()
    with seam.in_place():
        build(2)
    seam.check_complete()


def test_outside_vllm_builds_its_own_classes(seam: Seam) -> None:
    with pytest.raises(KeyError), seam.in_place():
        raise KeyError
    assert not op_registry_oot
    runner = build(prefix="other.layers.0.experts")
    assert type(runner) is MoERunner and type(runner.routed_experts) is RoutedExperts


def test_what_another_plugin_put_there_comes_back(
    seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(op_registry_oot, "MoERunner", PooledRunner)
    with seam.in_place():
        assert op_registry_oot["MoERunner"] is not PooledRunner
    assert op_registry_oot == {"MoERunner": PooledRunner}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_vllms_names_stand_for_vllms_classes(family: StandardFamily) -> None:
    """With the plugin registered: `vllm serve` asks for a model by the name in its config.json."""
    register()
    theirs = ModelRegistry.models[family.architecture.removeprefix("EmoServe")]
    assert theirs.module_name.startswith("vllm.model_executor.models.")
    ours = ModelRegistry.models[family.architecture]
    assert ours.module_name == "emo_serve.vllm_plugin.standard_models"


@pytest.mark.parametrize("layer", [1, 3])
def test_experts_where_the_config_has_none_are_refused(seam: Seam, layer: int) -> None:
    words = f"builds experts as model.layers.{layer}.mlp.experts, where a OLMoE .* none"
    with pytest.raises(ConfigError, match=words), seam.in_place():
        build(layer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"has_bias": True}, "has_bias True"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"custom_routing_function": max}, "custom_routing_function"),
        ({"shared_experts": torch.nn.Linear(64, 64)}, "shared_experts Linear"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input True"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ({"swiglu_limit": 7.0}, "swiglu_limit 7.0"),
        (
            {
                "scoring_func": "softmax",
                "use_grouped_topk": True,
                "num_expert_group": 2,
                "topk_group": 1,
            },
            "use_grouped_topk True",
        ),
    ],
)
def test_layers_of_other_maths_are_refused(seam: Seam, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words), seam.in_place():
        build(**changes)
    assert not op_registry_oot
