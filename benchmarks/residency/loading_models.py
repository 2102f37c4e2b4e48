"""The models of `loading`: the one that ships, a random wide one, random layers as released."""

from __future__ import annotations

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
    from benchmarks.harness.random_checkpoint import RELEASED, write_checkpoint

    sizes = RELEASED | {"num_hidden_layers": num_layers, "vocab_size": 3072}
    write_checkpoint(directory, sizes)
    shared = RELEASED["num_experts"] - 1
    layer_pools = [(*range(15), shared), (*range(16, 16 + pool_size), shared)]
    return [(experts,) * num_layers for experts in layer_pools]
