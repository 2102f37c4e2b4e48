"""A checkpoint of random weights in any sizes, with the shipped model's tokenizer, and pools of it.

It costs what a trained model of these sizes costs, in memory and time; it knows nothing, so no
accuracy can be measured on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from emo_serve import demo
from emo_serve.emo.tensor_names import expert_tensor_name

__all__ = ["RELEASED", "write_checkpoint", "write_pools"]

RELEASED = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_shared_experts": 1,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
}
"""The sizes of the released 14B models; with them a layer takes 1.6 GiB in bfloat16."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_NOISE = 2**24


def write_checkpoint(directory: Path, sizes: Mapping[str, int]) -> Path:
    """Write the checkpoint in bfloat16, one layer per file, and return its place.

    `sizes` replace fields of the shipped model's config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shipped = demo.model_dir()
    for name in _TOKENIZER:
        if (shipped / name).exists():
            (directory / name).write_bytes((shipped / name).read_bytes())
    config = json.loads((shipped / "config.json").read_text()) | dict(sizes)
    (directory / "config.json").write_text(json.dumps(config))
    hidden, inner, vocabulary = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(_NOISE, 2 * vocabulary * hidden), generator=generator)
    noise = (noise * hidden**-0.5).bfloat16()

    def draw(*shape: int) -> torch.Tensor:
        size = shape[0] * shape[1]
        start = int(torch.randint(len(noise) - size + 1, (1,), generator=generator))
        return noise[start : start + size].view(shape).clone()

    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    ends = {name: draw(vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    save(
        "ends.safetensors",
        {"model.norm.weight": ones, **{f"{name}.weight": each for name, each in ends.items()}},
    )
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{p}_proj.weight": draw(hidden, hidden) for p in "qkvo"}
        for norm in ("pre_attention_layernorm", "pre_feedforward_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones.clone()
        tensors[f"{prefix}mlp.gate.weight"] = draw(config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for matrix in ("gate", "up"):
                tensors[expert_tensor_name(layer, expert, matrix)] = draw(inner, hidden)
            tensors[expert_tensor_name(layer, expert, "down")] = draw(hidden, inner)
        save(f"layer-{layer}.safetensors", tensors)
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_pools(directory: Path, model: Path, names: list[str], size: int) -> Path:
    """Write a pool file per name, of `size` experts per layer drawn at random and the shared ones.

    Its scores rank all experts in the order drawn, so that it has every smaller size. Returns the
    directory.
    """
    config = json.loads((model / "config.json").read_text())
    routed = config["num_experts"] - config["num_shared_experts"]
    shared = list(range(routed, config["num_experts"]))
    ranks = torch.arange(routed, 0, -1) / routed
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    for name in names:
        layers = [
            {
                "experts": sorted(drawn[: size - len(shared)].tolist()) + shared,
                "scores": torch.zeros(routed).scatter(0, drawn, ranks).tolist()
                + [1.0] * len(shared),
            }
            for drawn in (
                torch.randperm(routed, generator=generator)
                for _ in range(config["num_hidden_layers"])
            )
        ]
        document = {"format": "emo-pool/1", "name": name, "layers": layers}
        (directory / f"{name}.json").write_text(json.dumps(document))
    return directory
