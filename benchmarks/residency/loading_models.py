"""The models of `loading`: the one that ships, a random wide one, random layers as released."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from emo_serve import demo

__all__ = ["MODELS", "Pool", "make_pools"]

MODELS = ("demo", "wide", "released")
Pool = tuple[tuple[int, ...], ...]


def make_pools(
    model: str, scratch: Path, num_layers: int, pool_size: int
) -> tuple[Path, list[Pool]]:
    """Return a model's directory and pools of it; all but the one that ships go to `scratch`.

    The first pool is for the streams, the others are loaded beside them. Only the released width
    takes layers and the size of the other pool.
    """
    if model == "demo":
        return demo.model_dir(), demo_pools()
    if model == "wide":
        return scratch, write_wide(scratch)
    return scratch, write_released(scratch, num_layers, pool_size)


def demo_pools() -> list[Pool]:
    """Return the pools that ship."""
    from emo_serve.emo.config import load_config
    from emo_serve.pools.catalog import PoolCatalog

    layers = load_config(demo.model_dir()).moe_layers
    return [
        pool.expert_ids for pool in PoolCatalog.read(demo.pools_dir(), layers, None).pools.values()
    ]


def write_wide(directory: Path) -> list[Pool]:
    """Write a random checkpoint whose loads take long, and return pools of it."""
    import torch

    from emo_serve.emo.checkpoint import save_checkpoint
    from emo_serve.emo.config import EmoConfig
    from emo_serve.emo.model import EmoForCausalLM

    torch.manual_seed(0)
    config = EmoConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
        num_shared_experts=1,
        max_position_embeddings=1024,
        eos_token_id=0,
        pad_token_id=1,
    )
    save_checkpoint(EmoForCausalLM(config), directory)
    starts = (0, 10, 20)
    return [tuple((*range(s, s + 10), 31) for _ in range(4)) for s in starts]


def write_released(directory: Path, num_layers: int, pool_size: int) -> list[Pool]:
    """Write random layers of the released width, 1.5 GiB each; return two pools of them.

    The first pool has 16 experts; the second has `pool_size` others, and the shared one.
    """
    import torch
    from safetensors.torch import save_file

    from emo_serve.emo.config import EmoConfig
    from emo_serve.emo.tensor_names import MATRICES, expert_tensor_name, trunk_shapes

    config = EmoConfig(vocab_size=2048, num_hidden_layers=num_layers, eos_token_id=0)
    hidden, width = config.hidden_size, config.intermediate_size
    torch.manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})

    save("trunk", {name: random(shape) for name, shape in trunk_shapes(config)})
    for layer in range(num_layers):
        shapes = dict.fromkeys(MATRICES, (width, hidden)) | {"down": (hidden, width)}
        names = itertools.product(range(config.num_experts), shapes.items())
        save(
            f"layer{layer}",
            {expert_tensor_name(layer, e, matrix): random(shape) for e, (matrix, shape) in names},
        )
    settings = {**config.to_dict(), "architectures": ["EmoForCausalLM"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(settings))
    shared = config.num_experts - 1
    layer_pools = [(*range(15), shared), (*range(16, 16 + pool_size), shared)]
    return [(experts,) * num_layers for experts in layer_pools]
