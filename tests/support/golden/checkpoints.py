"""Small random EMO checkpoints, the same bytes on any machine, one per corner of the config space.

Weights come from numpy's PCG64 with a seed a case, rounded to bfloat16. For `shared1`, the file
`shared1.json` beside this one holds the released reference implementation's log-probabilities on
exactly these weights (float32; full model and three pools, made by slicing router rows and
experts). The other cases have no outside reference: tests compare our two implementations with an
independent third one, `tests.support.naive_emo`.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BASE: dict[str, Any] = {
    "model_type": "emo",
    "architectures": ["EmoForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_experts_per_tok": 4,
    "num_experts": 16,
    "num_shared_experts": 1,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "pad_token_id": 257,
    "eos_token_id": 256,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "use_cache": True,
    "always_active_experts": None,
    "always_active_experts_per_layer": None,
    "num_experts_per_layer": None,
    "num_shared_experts_per_layer": None,
    "dense_intermediate_size": None,
    "dense_mlp_bias": False,
    "output_router_logits": False,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.01,
}

CASES: dict[str, dict[str, Any]] = {
    "shared1": {"num_experts": 32},
    "shared2-gqa": {"num_shared_experts": 2, "num_key_value_heads": 2, "attention_bias": True},
    "norm-topk": {"num_shared_experts": 0, "norm_topk_prob": True},
    "always-active": {"num_shared_experts": 0, "always_active_experts": [3, 7]},
    "dense-first": {
        "num_experts_per_layer": [0, 24, 12],
        "num_shared_experts_per_layer": [0, 2, 1],
        "always_active_experts_per_layer": [[], [], [0, 11]],
        "dense_intermediate_size": 160,
        "dense_mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "llama3": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}

RENAMED: dict[str, Any] = {
    "model_type": "flex_olmo_noqknorm_prenorm",
    "architectures": ["FlexOlmoNoQKNormPrenormForCausalLM"],
}
"""What config.json of the same model said before the release's rename."""

POOL_FRACTIONS = {"math": 0.375, "code": 0.375, "law": 0.5}


@dataclass(frozen=True)
class Golden:
    """The released reference's answers on `shared1`."""

    pools: dict[str, list[list[int]]]
    prompts: list[list[int]]
    prompt_logprobs: dict[str, list[list[float]]]


@cache
def golden() -> Golden:
    """Read the released reference's log-probabilities."""
    return Golden(**json.loads((Path(__file__).parent / "shared1.json").read_text()))


def config_of(case: str) -> dict[str, Any]:
    """Return the config.json of a case."""
    return {**BASE, **CASES[case]}


def experts_of(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the numbers of experts and of shared experts, per layer."""
    layers = config["num_hidden_layers"]
    experts = config["num_experts_per_layer"] or [config["num_experts"]] * layers
    shared = config["num_shared_experts_per_layer"]
    return experts, shared or [min(config["num_shared_experts"], count) for count in experts]


def always_of(config: dict[str, Any], layer: int) -> list[int]:
    """Return a layer's always-active experts."""
    per_layer = config["always_active_experts_per_layer"]
    return (per_layer[layer] if per_layer else config["always_active_experts"]) or []


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def weights_of(case: str) -> dict[str, np.ndarray]:
    """Draw a case's weights, float32, before rounding; the order of draws is part of the case."""
    config, rng = config_of(case), _generator(case)

    def draw(*shape: int, std: float = 0.09) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {
        "model.embed_tokens.weight": draw(config["vocab_size"], hidden, std=1.0),
        "lm_head.weight": draw(config["vocab_size"], hidden),
        "model.norm.weight": 1 + draw(hidden),
    }
    for layer, num_experts in enumerate(experts_of(config)[0]):
        prefix = f"model.layers.{layer}."
        weights[prefix + "pre_attention_layernorm.weight"] = 1 + draw(hidden)
        weights[prefix + "pre_feedforward_layernorm.weight"] = 1 + draw(hidden)
        for name, width in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = draw(width, hidden)
            if config["attention_bias"]:
                weights[f"{prefix}self_attn.{name}_proj.bias"] = draw(width)
        if num_experts == 0:
            dense = config["dense_intermediate_size"]
            shapes = {"gate": (dense, hidden), "up": (dense, hidden), "down": (hidden, dense)}
            for name, shape in shapes.items():
                weights[f"{prefix}mlp.{name}_proj.weight"] = draw(*shape)
                if config["dense_mlp_bias"]:
                    weights[f"{prefix}mlp.{name}_proj.bias"] = draw(shape[0])
            continue
        weights[prefix + "mlp.gate.weight"] = draw(num_experts, hidden, std=0.2)
        for expert in range(num_experts):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
                weights[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = draw(*shape, std=0.15)
            weights[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = draw(
                hidden, inner, std=0.15
            )
    return weights


def rounded_weights_of(case: str) -> dict[str, np.ndarray]:
    """Return the weights as the checkpoint holds them: rounded to bfloat16, given as float64."""
    return {
        name: torch.from_numpy(weight).to(torch.bfloat16).double().numpy()
        for name, weight in weights_of(case).items()
    }


def pools_of(case: str) -> dict[str, list[list[int]]]:
    """Return pools of a case, a list of expert ids per layer; for shared1 the published ones.

    `tiny` holds fewer experts than a token takes.
    """
    config = config_of(case)
    experts, shared = experts_of(config)
    if case == "shared1":
        pools = dict(golden().pools)
    else:
        rng = _generator(case + "/pools")
        pools = {
            name: [
                sorted(rng.permutation(count)[: int(count * fraction)].tolist())
                for count in experts
            ]
            for name, fraction in POOL_FRACTIONS.items()
        }
    pools["tiny"] = [[1] if count else [] for count in experts]
    for kept in pools.values():
        for layer, count in enumerate(experts):
            implied = {*always_of(config, layer), *range(count - shared[layer], count)}
            kept[layer] = sorted({*kept[layer], *implied})
    return pools


def prompts_of(case: str) -> list[list[int]]:
    """Return three prompts of 40 token ids."""
    return _generator(case + "/prompts").integers(0, 256, (3, 40)).tolist()


def write_checkpoint(case: str, directory: Path, **fields: Any) -> Path:
    """Write a case in the released layout with a byte tokenizer, and return the directory.

    `fields` take the place of those that the case's config.json has.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: torch.from_numpy(weight).to(torch.bfloat16)
        for name, weight in weights_of(case).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**config_of(case), **fields}, indent=1))
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary.update({"<|endoftext|>": 256, "<|pad|>": 257})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|pad|>",
                "chat_template": template,
            }
        )
    )
    return directory
