"""Tiny checkpoints of random weights, one for each family, made by transformers.

They have the shipped model's tokenizer. Routers are drawn wide, so that pools change answers by
nats. One layer of the Qwen3-MoE is dense. The dense baseline of EMO's release is a Llama under
other names, so a Llama is what it is made of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from emo_serve import demo

__all__ = [
    "DENSE",
    "DENSE_NAMES",
    "LAYERS",
    "MODELS",
    "VOCABULARY",
    "TinyModel",
    "build",
    "write_checkpoint",
]

DENSE = "dense"
LAYERS = 3
VOCABULARY = 3072  # the shipped tokenizer's

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class TinyModel:
    """One family's tiny model; `slots` are fewer than its experts, and hold `pool_sizes` at once.

    `fields` are those of transformers' config beside the common ones. `experts` names the one that
    counts experts; None of the dense model.
    """

    config: str
    fields: Mapping[str, Any]
    experts: str | None = None
    slots: int = 0
    pool_sizes: tuple[int, ...] = ()
    dense_layers: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        """Return the experts of a MoE layer, 0 of the dense model."""
        return self.fields[self.experts] if self.experts else 0


MODELS = {
    DENSE: TinyModel("LlamaConfig", {"intermediate_size": 96, "rope_theta": 500000.0}),
    "olmoe": TinyModel(
        "OlmoeConfig",
        {"intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4},
        "num_experts",
        slots=12,
        pool_sizes=(8, 4, 2),
    ),
    "qwen3-moe": TinyModel(
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        "num_experts",
        slots=12,
        pool_sizes=(8, 4, 2),
        dense_layers=(1,),
    ),
    "mixtral": TinyModel(
        "MixtralConfig",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        "num_local_experts",
        slots=6,
        pool_sizes=(4, 2, 1),
    ),
    "flex-olmo": TinyModel(
        "FlexOlmoConfig",
        {"intermediate_size": 32, "num_experts": 7, "num_experts_per_tok": 7},
        "num_experts",
        slots=5,
        pool_sizes=(4, 3, 2),
    ),
}

DENSE_NAMES = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
}
"""Names of Llama -> of the dense baseline."""


def build(model: TinyModel, num_experts: int | None = None) -> nn.Module:
    """Return transformers' model of this family in float32, with its own initial weights.

    With `num_experts` it is a smaller model, whose tokens take no more experts than it has.
    """
    fields = {**_COMMON, **model.fields}
    if num_experts is not None and model.experts is not None:
        fields[model.experts] = num_experts
        fields["num_experts_per_tok"] = min(fields["num_experts_per_tok"], num_experts)
    config = getattr(transformers, model.config)(**fields)
    made = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    return made.eval()  # type: ignore[no-any-return]


def write_checkpoint(family: str, directory: Path) -> Path:
    """Write a family's checkpoint in float32; the same bytes every time."""
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build(MODELS[family])
        _widen(made)
    if family == DENSE:
        _save_dense(made, directory)
    else:
        made.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.model_dir() / name, directory / name)
    return directory


@torch.no_grad()
def _widen(made: nn.Module) -> None:
    """Draw routers and experts so that it matters which experts a token takes."""
    for name, parameter in made.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight")):
            nn.init.normal_(parameter, std=0.6)
        elif parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("norm.weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)


def _save_dense(made: nn.Module, directory: Path) -> None:
    """Write a Llama as the dense baseline of EMO's release."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in made.state_dict().items():
        for theirs, ours in DENSE_NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        **_COMMON,
        **MODELS[DENSE].fields,
        "rms_norm_eps": made.config.rms_norm_eps,
        "architectures": ["Olmo2NoQKNormPrenormForCausalLM"],
        "model_type": "olmo2_noqknorm_prenorm",
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
