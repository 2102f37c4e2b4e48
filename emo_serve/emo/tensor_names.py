"""The tensors of a checkpoint in the released layout: their names, and the trunk's shapes.

An expert is three tensors, `model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`; everything
else is trunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from emo_serve.emo.config import EmoConfig, MoeLayer

__all__ = [
    "MATRICES",
    "expected_names",
    "expert_tensor_name",
    "gate_name",
    "is_left_over",
    "parse_expert_name",
    "trunk_shapes",
]

MATRICES = ("gate", "up", "down")
"""The matrices of an expert, as in its tensors' names."""

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")

_LEFT_OVER = re.compile(
    r"(.*\.)?("
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(self_attn|attn|attention)\.(bias|masked_bias|causal_mask)"
    r"|position_ids|num_batches_tracked|_extra_state"
    r")"
)
"""Buffers that frameworks save beside weights: rotations, masks and counters, all computed anew."""


def expert_tensor_name(layer: int, expert: int, matrix: str) -> str:
    """Return the name of an expert's matrix: 'gate', 'up' or 'down'."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"


def parse_expert_name(name: str) -> tuple[int, int, str] | None:
    """Return (layer, expert, matrix) of an expert's tensor, None for the trunk's."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


def is_left_over(name: str) -> bool:
    """Tell whether a tensor is a buffer of other software, which no model needs to be given."""
    return _LEFT_OVER.fullmatch(name) is not None


def gate_name(layer: int) -> str:
    """Return the name of a MoE layer's gate."""
    return f"model.layers.{layer}.mlp.gate.weight"


def expected_names(config: EmoConfig) -> Iterator[str]:
    """Yield the name of every tensor that a model of this config has."""
    yield from (name for name, _ in trunk_shapes(config))
    for index, moe in enumerate(config.moe_layers):
        if moe is not None:
            yield from _expert_names(index, moe)


def trunk_shapes(config: EmoConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that is not an expert's."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)
    kv = config.num_kv_heads * config.head_dim
    for index, moe in enumerate(config.moe_layers):
        prefix = f"model.layers.{index}."
        for norm in ("pre_attention_layernorm", "pre_feedforward_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for projection, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{prefix}self_attn.{projection}_proj.weight", (rows, hidden)
            if config.attention_bias:
                yield f"{prefix}self_attn.{projection}_proj.bias", (rows,)
        if moe is not None:
            yield gate_name(index), (moe.num_experts, hidden)
            continue
        width = config.dense_intermediate_size
        assert width is not None, "checked with the config"
        for matrix, shape in (
            ("gate", (width, hidden)),
            ("up", (width, hidden)),
            ("down", (hidden, width)),
        ):
            yield f"{prefix}mlp.{matrix}_proj.weight", shape
            if config.dense_mlp_bias:
                yield f"{prefix}mlp.{matrix}_proj.bias", shape[:1]


def _expert_names(index: int, moe: MoeLayer) -> Iterator[str]:
    for expert in range(moe.num_experts):
        for matrix in MATRICES:
            yield expert_tensor_name(index, expert, matrix)
