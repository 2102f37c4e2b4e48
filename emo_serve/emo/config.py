"""The configuration of an EMO checkpoint, in the released field names.

`EmoConfig` is a transformers config, because vLLM reads models through transformers. Beyond
the fields it has two derived views: `moe_layers`, what routing needs to know about each layer, with
per-layer overrides applied, and `facts`, which the rest of emo-serve reads instead of the raw
fields. An inconsistent configuration is refused when it is built.

The release has two more names for this network: checkpoints from before its rename, and the dense
baseline, which has no experts. Their fields are EMO's, with other defaults.

Released fields: https://github.com/allenai/EMO (src/hf_trust_remote_code).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from emo_serve.checkpoints.json_file import read_object, shown
from emo_serve.emo.config_fields import check_fields
from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts, MoeLayer

__all__ = [
    "EMO_CONFIGS",
    "ROPE_TYPES",
    "DenseBaselineConfig",
    "EmoConfig",
    "RenamedEmoConfig",
    "load_config",
]

# longrope and proportional choose their frequencies by the length of each sequence, which does not
# work with one KV cache shared by sequences of all lengths.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


class EmoConfig(PreTrainedConfig):
    """Describe an EMO checkpoint (`model_type: emo`); defaults are the released 1B-14B model's.

    Raises ConfigError naming field, value and reason when the fields contradict each other.
    """

    model_type = "emo"
    default_theta = 500000.0

    vocab_size: int = 100352
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 100277
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 100257
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    num_experts_per_tok: int = 8
    num_experts: int = 128
    num_shared_experts: int = 1
    num_experts_per_layer: list[int] | None = None
    num_shared_experts_per_layer: list[int] | None = None
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int] | None] | None = None
    dense_intermediate_size: int | None = None
    dense_mlp_bias: bool = False
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        head_dim = kwargs.pop("head_dim", None)
        _check_names(kwargs)
        check_fields({**vars(self), **kwargs})
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        _check(self)
        if head_dim not in (None, self.head_dim):
            _refuse("head_dim", head_dim, f"EMO's is hidden_size / heads, {self.head_dim}")

    @property
    def moe_layers(self) -> tuple[MoeLayer | None, ...]:
        """Return what routing needs to know, per layer; None stands for a dense layer."""
        return tuple(_moe_layer(self, index) for index in range(self.num_hidden_layers))

    @property
    def facts(self) -> ModelFacts:
        """Return what the rest of emo-serve needs to know of the model."""
        layers = self.moe_layers
        return ModelFacts(
            family="EMO" if any(layers) else "dense model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            expert_width=self.intermediate_size if any(layers) else 0,
            max_position_embeddings=self.max_position_embeddings,
            moe_layers=layers,
            norm_topk_prob=self.norm_topk_prob,
            has_reference=True,
        )

    @property
    def num_kv_heads(self) -> int:
        """Return the number of key and value heads; without grouping, all of them."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class RenamedEmoConfig(EmoConfig):
    """Describe an EMO from before its rename (`FlexOlmoNoQKNormPrenormForCausalLM`)."""

    model_type = "flex_olmo_noqknorm_prenorm"

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_experts_per_tok: int = 5
    num_experts: int = 7
    num_shared_experts: int = 0


class DenseBaselineConfig(EmoConfig):
    """Describe the dense model of the release (`Olmo2NoQKNormPrenormForCausalLM`).

    Defaults are those of OLMo 2, from which its class is derived.
    """

    model_type = "olmo2_noqknorm_prenorm"
    default_theta = 10000.0

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 50279
    num_experts: int = 0
    num_shared_experts: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_experts or self.num_experts_per_layer:
            raise ConfigError(
                f"num_experts is {shown(self.num_experts or self.num_experts_per_layer)}; expected"
                " no experts in a dense model"
            )
        self.dense_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)


EMO_CONFIGS: dict[str, type[EmoConfig]] = {
    config.model_type: config for config in (EmoConfig, RenamedEmoConfig, DenseBaselineConfig)
}
"""By the model_type of config.json."""


def load_config(directory: Path) -> EmoConfig:
    """Read and check `config.json` of a checkpoint directory.

    Raises ConfigError when the file is missing, is not JSON, is of another model type, or is
    refused.
    """
    path = Path(directory) / "config.json"
    try:
        known = read_object(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; expected an EMO checkpoint directory") from None
    model_type = known.get("model_type")
    if not isinstance(model_type, str) or model_type not in EMO_CONFIGS:
        raise ConfigError(
            f"{path}: model_type is {shown(model_type)}; expected one of {', '.join(EMO_CONFIGS)}"
        )
    try:
        return EMO_CONFIGS[model_type](**known)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # transformers computes with fields, and each way to fail is its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: transformers cannot read it: {reason}") from error


# -- derived view --


def _moe_layer(config: EmoConfig, index: int) -> MoeLayer | None:
    num_experts, num_shared = config.num_experts, config.num_shared_experts
    if config.num_experts_per_layer is not None:
        num_experts = config.num_experts_per_layer[index]
        num_shared = min(num_shared, num_experts)
    if num_experts == 0:
        return None
    if config.num_shared_experts_per_layer is not None:
        num_shared = config.num_shared_experts_per_layer[index]
    always = config.always_active_experts
    if config.always_active_experts_per_layer is not None:
        always = config.always_active_experts_per_layer[index]
    return MoeLayer(
        num_experts=num_experts,
        num_shared_experts=num_shared,
        always_active=tuple(sorted(always or ())),
        top_k=min(config.num_experts_per_tok, num_experts),
    )


# -- checks --


def _refuse(field: str, value: object, reason: str) -> None:
    raise ConfigError(f"{field} is {shown(value)}: {reason}")


def _check_names(names: Iterable[str]) -> None:
    """Refuse fields that would hide the class's own methods, properties and constants."""
    known = {field.name for field in fields(EmoConfig)} | {"model_type"}
    for name in names:
        attribute = inspect.getattr_static(EmoConfig, name, None)
        can_be_set = isinstance(attribute, property) and attribute.fset is not None
        if name not in known and attribute is not None and not can_be_set:
            raise ConfigError(
                f"{shown(name)} is a field of the file; expected none of that name, which the"
                " configuration has for itself; remove it"
            )


def _check_integer(field: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        _refuse(field, value, f"must be an integer of at least {at_least}")


def _check(config: EmoConfig) -> None:
    _check_trunk(config)
    _check_rope(config)
    _check_lists(config)
    for index in range(config.num_hidden_layers):
        _check_layer(config, index)


def _check_trunk(config: EmoConfig) -> None:
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "num_experts_per_tok",
    ):
        _check_integer(field, getattr(config, field), at_least=1)
    for field in ("num_experts", "num_shared_experts"):
        _check_integer(field, getattr(config, field), at_least=0)
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    if config.hidden_size % heads:
        _refuse("num_attention_heads", heads, f"does not divide hidden_size {config.hidden_size}")
    if config.head_dim % 2:
        _refuse("num_attention_heads", heads, f"heads of odd width {config.head_dim} cannot rotate")
    if heads % kv_heads:
        _refuse("num_key_value_heads", kv_heads, f"does not divide num_attention_heads {heads}")
    if config.hidden_act != "silu":
        _refuse("hidden_act", config.hidden_act, "EMO's experts are SwiGLU; only 'silu' is served")
    if config.tie_word_embeddings:
        _refuse("tie_word_embeddings", True, "EMO's lm_head is untied")
    if config.rms_norm_eps <= 0:
        _refuse("rms_norm_eps", config.rms_norm_eps, "must be positive")


def _check_rope(config: EmoConfig) -> None:
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        _refuse("rope_scaling", rope_type, f"rope_type must be one of {', '.join(ROPE_TYPES)}")
    if not rope.get("rope_theta") or rope["rope_theta"] <= 0:
        _refuse("rope_theta", rope.get("rope_theta"), "must be positive")
    if rope_type != "default" and not rope.get("factor", 0) >= 1:
        _refuse("rope_scaling", rope, f"rope_type {rope_type!r} needs a factor of at least 1")
    if rope_type == "llama3":
        low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
        if low is None or high is None or not low < high:
            _refuse("rope_scaling", rope, "llama3 needs low_freq_factor < high_freq_factor")


def _check_lists(config: EmoConfig) -> None:
    for field in (
        "num_experts_per_layer",
        "num_shared_experts_per_layer",
        "always_active_experts_per_layer",
    ):
        value = getattr(config, field)
        if value is not None and len(value) != config.num_hidden_layers:
            _refuse(field, value, f"needs one entry per layer, {config.num_hidden_layers}")


def _check_layer(config: EmoConfig, index: int) -> None:
    per_layer = config.num_experts_per_layer
    num_experts = config.num_experts if per_layer is None else per_layer[index]
    field = "num_experts" if per_layer is None else f"num_experts_per_layer[{index}]"
    _check_integer(field, num_experts, at_least=0)
    layer = _moe_layer(config, index)
    if layer is None:
        if not config.dense_intermediate_size or config.dense_intermediate_size < 1:
            _refuse(
                "dense_intermediate_size",
                config.dense_intermediate_size,
                f"layer {index} has no experts, so it is dense and needs a width",
            )
        return
    if not 0 <= layer.num_shared_experts <= num_experts:
        _refuse(
            "num_shared_experts",
            layer.num_shared_experts,
            f"layer {index} has {num_experts} experts",
        )
    for expert in layer.always_active:
        if not 0 <= expert < num_experts:
            _refuse("always_active_experts", expert, f"layer {index} has ids 0..{num_experts - 1}")
    if len(set(layer.always_active)) != len(layer.always_active):
        _refuse("always_active_experts", list(layer.always_active), "lists an expert twice")
    forced = len(layer.always_active) or layer.num_shared_experts
    if forced > layer.top_k:
        _refuse(
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"layer {index} forces {forced} experts into every token's {layer.top_k}",
        )
    if config.norm_topk_prob and forced:
        _refuse(
            "norm_topk_prob",
            True,
            "is only defined without shared and always-active experts (they have weights of"
            " their own)",
        )
