"""What each field of config.json may hold, before anything computes with it.

transformers stores whatever JSON gives and converts some of it on the way, so a wrong type would
surface later, as an error far from the file. Here is every field that transformers, vLLM or
emo-serve reads. How fields must agree with each other is checked in `emo.config`. Fields unknown
here may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from emo_serve.checkpoints.json_file import shown
from emo_serve.checkpoints.kinds import (
    COUNT,
    FLAG,
    OBJECT,
    POSITIVE,
    REAL,
    TEXT,
    TEXTS,
    TOKENS,
    Kind,
    check_table,
    integer,
    number,
)

__all__ = ["check_fields"]

_MOST_LAYERS = 4096
_MOST_EXPERTS = 2**16
_MOST_POSITIONS = 2**24  # vLLM tabulates the rotations of all positions
_MOST_LABELS = 2**16  # transformers makes a label of each


def check_fields(fields: Mapping[str, object]) -> None:
    """Raise ConfigError, with field, value and expectation, for the first field of a wrong kind."""
    check_table(_FIELDS, fields)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if isinstance(rope, dict):
            kinds = {key: _ROPE_FIELDS.get(key, _FLAT) for key in rope}
            places = {key: f"{name}[{shown(key)}]" for key in rope}
            check_table(
                {places[key]: kind for key, kind in kinds.items()},
                {places[key]: value for key, value in rope.items()},
            )


def _is_dtype(value: object) -> bool:
    import torch

    if isinstance(value, str):
        value = getattr(torch, value, None)
    return isinstance(value, torch.dtype)


def _is_label_table(value: object) -> bool:
    """Tell whether the keys are whole numbers, which transformers makes of them."""
    return isinstance(value, dict) and all(
        type(key) is int or (isinstance(key, str) and key.isascii() and key.isdigit())
        for key in value
    )


_SIZE = integer(1)
_EXPERTS = integer(0, _MOST_EXPERTS)
_POSITIONS = integer(1, _MOST_POSITIONS)
_FRACTION = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
_COUNTS_PER_LAYER = _EXPERTS.list(f"a list of integers of at least 0 and at most {_MOST_EXPERTS}")
_IDS = COUNT.list("a list of expert ids")
_DTYPE = Kind("the name of a torch dtype, such as 'bfloat16'", _is_dtype)
_PLACE = TEXT.or_(Kind("a path", lambda value: isinstance(value, PathLike)))  # as a caller gave it
_SCALAR = Kind("", lambda value: value is None or isinstance(value, str | int | float))
_FLAT = Kind("a number or a string", _SCALAR.holds).or_(_SCALAR.list("a list of them"))

_FIELDS: dict[str, Kind] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": integer(1, _MOST_LAYERS),
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE.or_null(),
    "hidden_act": TEXT,
    "max_position_embeddings": _POSITIONS,
    "initializer_range": REAL.or_null(),
    "rms_norm_eps": REAL,
    "use_cache": FLAG.or_null(),
    "pad_token_id": TOKENS.or_null(),
    "bos_token_id": TOKENS.or_null(),
    "eos_token_id": TOKENS.or_null(),
    "tie_word_embeddings": FLAG.or_null(),
    "rope_parameters": OBJECT.or_null(),
    "rope_scaling": OBJECT.or_null(),
    "rope_theta": POSITIVE.or_null(),
    "partial_rotary_factor": _FRACTION.or_null(),
    "original_max_position_embeddings": _POSITIONS,
    "attention_bias": FLAG.or_null(),
    "attention_dropout": REAL.or_null(),
    "num_experts_per_tok": _SIZE,
    "num_experts": _EXPERTS,
    "num_shared_experts": _EXPERTS,
    "num_experts_per_layer": _COUNTS_PER_LAYER.or_null(),
    "num_shared_experts_per_layer": _COUNTS_PER_LAYER.or_null(),
    "always_active_experts": _IDS.or_null(),
    "always_active_experts_per_layer": _IDS.or_null()
    .list("a list with one list of expert ids per layer")
    .or_null(),
    "dense_intermediate_size": COUNT.or_null(),
    "dense_mlp_bias": FLAG.or_null(),
    "norm_topk_prob": FLAG.or_null(),
    "output_router_logits": FLAG.or_null(),
    "router_aux_loss_coef": REAL.or_null(),
    # -- transformers' own, and what vLLM reads of any model --
    "transformers_version": TEXT.or_null(),
    "architectures": TEXTS.or_null(),
    "dtype": _DTYPE.or_null(),
    "torch_dtype": _DTYPE.or_null(),
    "output_hidden_states": FLAG.or_null(),
    "output_attentions": FLAG.or_null(),
    "return_dict": FLAG.or_null(),
    "is_encoder_decoder": FLAG.or_null(),
    "chunk_size_feed_forward": COUNT.or_null(),
    "id2label": Kind("an object whose keys are whole numbers", _is_label_table).or_null(),
    "label2id": OBJECT.or_null(),
    "num_labels": integer(0, _MOST_LABELS).or_null(),
    "problem_type": TEXT.or_null(),
    "layer_types": TEXTS.or_null(),
    "mtp_layer_types": TEXTS.or_null(),
    "per_layer_config": Kind(
        "none: experts per layer stand in num_experts_per_layer", lambda value: not value
    ),
    "quantization_config": OBJECT.or_null(),
    "compression_config": OBJECT.or_null(),
    "text_config": OBJECT.or_null(),
    "sliding_window": COUNT.or_null(),
    "auto_map": OBJECT.or_null(),
    "name_or_path": _PLACE.or_null(),
    "_name_or_path": _PLACE.or_null(),
    "attn_implementation": TEXT.or_null(),
    "_attn_implementation": TEXT.or_null(),
    "experts_implementation": TEXT.or_null(),
}

_ROPE_FIELDS: dict[str, Kind] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": _FRACTION,
    "factor": REAL,
    "original_max_position_embeddings": _POSITIONS,
    "attention_factor": POSITIVE.or_null(),
    "beta_fast": POSITIVE.or_null(),
    "beta_slow": POSITIVE.or_null(),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "mscale": REAL.or_null(),
    "mscale_all_dim": REAL.or_null(),
    "truncate": FLAG.or_null(),
}
