"""The tensors of a checkpoint in the released layout: their names, and the trunk's shapes.

An expert is three tensors, `model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`; everything
else is trunk.
"""

from __future__ import annotations

from collections.abc import Iterator

from emo_serve.emo.config import EmoConfig
from emo_serve.facts import ExpertNames

__all__ = [
    "NAMES",
    "expected_names",
    "expert_tensor_name",
    "gate_name",
    "trunk_shapes",
]

NAMES = ExpertNames()
"""EMO's names of gates and experts."""


def expert_tensor_name(layer: int, expert: int, matrix: str) -> str:
    """Return the name of an expert's matrix: 'gate', 'up' or 'down'."""
    return NAMES.expert(layer, expert, matrix)


def gate_name(layer: int) -> str:
    """Return the name of a MoE layer's gate."""
    return NAMES.router(layer)


def expected_names(config: EmoConfig) -> Iterator[str]:
    """Yield the name of every tensor that a model of this config has."""
    yield from (name for name, _ in trunk_shapes(config))
    yield from config.facts.expert_names()


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
