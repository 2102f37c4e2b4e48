"""Families of softmax MoE models that vLLM has: their fields, names and what is refused of them.

A model of these is served by vLLM's own class, with our layer in place of its experts, so only what
that layer must know is read here. Routing is a softmax over the experts, the top k of it, and for
some the weights made to sum to 1; a checkpoint that routes in any other way is refused by the field
that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emo_serve.checkpoints.json_file import shown
from emo_serve.checkpoints.kinds import COUNT, FLAG, Kind, check_table, integer
from emo_serve.errors import ConfigError
from emo_serve.facts import ExpertNames, ModelFacts, MoeLayer

__all__ = ["FAMILIES", "StandardFamily", "check_served", "facts_of"]

_MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class StandardFamily:
    """One family: where its config.json says what, and our vLLM model for it.

    `norm_topk_prob` is a constant, or None where the field of that name decides. `fixed` are the
    values that vLLM's class computes with whatever the field says; others are refused.
    """

    name: str
    model_type: str
    architecture: str
    expert_width: str = "intermediate_size"
    norm_topk_prob: bool | None = None
    names: ExpertNames = field(default_factory=ExpertNames)
    fixed: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    is_dense: Callable[[Mapping[str, Any], int], bool] = lambda fields, layer: False


def _is_dense_qwen3(fields: Mapping[str, Any], layer: int) -> bool:
    """Tell whether a layer of Qwen3-MoE has no experts, as vLLM and transformers do."""
    return layer in (fields.get("mlp_only_layers") or ()) or bool(
        (layer + 1) % (fields.get("decoder_sparse_step") or 1)
    )


_FIXED_BY_VLLM = "vLLM's class computes without it"

FAMILIES = {
    family.model_type: family
    for family in (
        StandardFamily(
            "OLMoE",
            "olmoe",
            "EmoServeOlmoeForCausalLM",
            fixed={
                "clip_qkv": (None, _FIXED_BY_VLLM),
                "attention_bias": (False, _FIXED_BY_VLLM),
                "rms_norm_eps": (1e-5, "vLLM's class always computes with 1e-05"),
                "tie_word_embeddings": (False, "vLLM's class has an lm_head of its own"),
            },
        ),
        StandardFamily(
            "Qwen3-MoE",
            "qwen3_moe",
            "EmoServeQwen3MoeForCausalLM",
            expert_width="moe_intermediate_size",
            is_dense=_is_dense_qwen3,
            fixed={"attention_bias": (False, "vLLM's class has no bias in o_proj")},
        ),
        StandardFamily(
            "Mixtral",
            "mixtral",
            "EmoServeMixtralForCausalLM",
            norm_topk_prob=True,
            names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
            fixed={"attention_bias": (False, _FIXED_BY_VLLM)},
        ),
        StandardFamily("FlexOlmo", "flex_olmo", "EmoServeFlexOlmoForCausalLM"),
    )
}
"""By the model_type of config.json."""


def facts_of(family: StandardFamily, fields: Mapping[str, Any]) -> ModelFacts:
    """Return the facts of a model from all fields of its config, defaults included.

    Raises ConfigError naming the field, its value and what is expected.
    """
    check_served(fields)
    _check_fields(family, fields)
    num_experts = fields[_count_field(fields)]
    layer = MoeLayer(num_experts, 0, (), min(fields["num_experts_per_tok"], num_experts))
    layers = tuple(
        None if family.is_dense(fields, index) else layer
        for index in range(fields["num_hidden_layers"])
    )
    if not any(layers):
        raise ConfigError(
            f"no layer has experts (decoder_sparse_step is {fields.get('decoder_sparse_step')});"
            f" expected a {family.name} with at least one MoE layer"
        )
    normalised = family.norm_topk_prob
    return ModelFacts(
        family=family.name,
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        expert_width=fields[family.expert_width],
        max_position_embeddings=fields["max_position_embeddings"],
        moe_layers=layers,
        norm_topk_prob=bool(fields.get("norm_topk_prob")) if normalised is None else normalised,
        architecture=family.architecture,
        names=family.names,
    )


def _count_field(fields: Mapping[str, Any]) -> str:
    """Return which field counts the experts of a layer: transformers has renamed some families'."""
    return "num_experts" if "num_experts" in fields else "num_local_experts"


def _check_fields(family: StandardFamily, fields: Mapping[str, Any]) -> None:
    size = integer(1)
    kinds = dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "max_position_embeddings",
            "num_hidden_layers",
            "num_experts_per_tok",
            family.expert_width,
        ),
        size,
    )
    kinds[_count_field(fields)] = integer(1, _MOST_EXPERTS)
    kinds["norm_topk_prob"] = FLAG.or_null()
    kinds["decoder_sparse_step"] = size.or_null()
    kinds["mlp_only_layers"] = COUNT.list("a list of layers").or_null()
    kinds["hidden_act"] = Kind("'silu': experts are SwiGLU", lambda value: value == "silu")
    check_table(kinds, fields)
    for name, (value, reason) in family.fixed.items():
        if name in fields and fields[name] not in (value, None):
            raise ConfigError(
                f"{name} is {shown(fields[name])}; expected {shown(value)} of {family.name}:"
                f" {reason}"
            )


# -- what no family may have --


@dataclass(frozen=True)
class _Refused:
    """Fields that mean the same in different models, the values that leave it off, and why not."""

    names: tuple[str, ...]
    off: tuple[object, ...]
    reason: str


_NONE = (None, 0, 1, False)

_REFUSED = (
    _Refused(
        ("scoring_func", "score_func", "score_function", "router_score_function"),
        (None, "softmax"),
        "only routers with softmax scores are served: a pool's mask comes before the softmax",
    ),
    _Refused(
        ("use_routing_bias", "moe_router_enable_expert_bias", "use_expert_bias"),
        (None, False),
        "scores with a correction bias are not served",
    ),
    _Refused(
        ("topk_method",),
        (None, "greedy"),
        "scores with a correction bias and experts in groups are not served",
    ),
    _Refused(
        ("n_group", "topk_group", "num_expert_group", "num_expert_groups"),
        _NONE,
        "experts in groups are not served",
    ),
    _Refused(
        ("moe_bias", "expert_bias", "experts_bias", "mlp_bias"),
        (None, False),
        "experts with biases are not served",
    ),
    _Refused(
        ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"),
        (None, 0),
        "shared experts beside the routed ones are served of EMO only",
    ),
    _Refused(("routed_scaling_factor",), (None, 1, 1.0), "scaled experts are not served"),
    _Refused(
        ("quantization_config", "compression_config"),
        (None,),
        "quantised checkpoints are not served; give the one in bfloat16 (--expert-dtype fp8_e4m3"
        " halves its experts on a GPU)",
    ),
)


def check_served(fields: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first field that says what no standard family may have."""
    for refused in _REFUSED:
        for name in refused.names:
            value = fields.get(name)
            if not any(value is off or (value == off and off is not None) for off in refused.off):
                raise ConfigError(f"{name} is {shown(value)}: {refused.reason}")
