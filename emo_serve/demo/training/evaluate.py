"""Held-out loss of a model inside pools: the evidence for the demo's claim.

All figures are nats per token over the first `HELDOUT_TOKENS` of each held-out text, with equal
weight per domain; plain reference model, fp32 arithmetic on the shipped weights.

Shapes: B texts, T tokens, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from emo_serve import demo
from emo_serve.demo.training.corpus import HELDOUT_TOKENS
from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.pools.document import read_pool
from emo_serve.pools.pool import ExpertPool

__all__ = ["Experiment", "encode_texts", "heldout_loss", "pool_masks"]

_TEXTS_PER_CALL = 8


def encode_texts(model_directory: Path, texts: Sequence[str]) -> Tensor:
    """Return ids [B, HELDOUT_TOKENS], each row opened by end-of-text."""
    tokenizer = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    return torch.tensor([tokenizer.encode(text).ids[:HELDOUT_TOKENS] for text in texts])


def pool_masks(pool: ExpertPool | None, config: EmoConfig) -> list[Tensor | None] | None:
    """Return the reference model's `pool` argument: a bool mask [E] per layer, None when dense."""
    if pool is None:
        return None
    masks: list[Tensor | None] = []
    for moe, experts in zip(config.moe_layers, pool.expert_ids, strict=True):
        mask_E = None
        if moe is not None:
            mask_E = torch.zeros(moe.num_experts, dtype=torch.bool)
            mask_E[[*experts, *moe.implied]] = True
        masks.append(mask_E)
    return masks


@torch.no_grad()
def heldout_loss(model: EmoForCausalLM, ids_BT: Tensor, pool: ExpertPool | None = None) -> float:
    """Return the mean cross entropy in nats per token, inside `pool` (None: all experts)."""
    masks = pool_masks(pool, model.config)
    total = 0.0
    for part_BT in ids_BT.split(_TEXTS_PER_CALL):
        logits_BTV = model(part_BT[:, :-1], pool=masks)
        targets = part_BT[:, 1:].flatten()
        total += F.cross_entropy(logits_BTV.flatten(0, 1), targets, reduction="sum").item()
    return total / ids_BT[:, 1:].numel()


@dataclass(frozen=True)
class Experiment:
    """One shipped model with its pools and encoded held-out texts, by domain."""

    model: EmoForCausalLM
    pools: dict[str, ExpertPool]
    texts: dict[str, Tensor]

    @classmethod
    def shipped(cls, name: str, texts: int | None = None) -> Experiment:
        """Load a shipped model and the first `texts` held-out texts of each domain (None: all)."""
        directory = demo.model_dir(name)
        pools, encoded = {}, {}
        for domain in demo.domains():
            pools[domain] = read_pool(demo.pools_dir(name) / f"{domain}.json")
            encoded[domain] = encode_texts(directory, demo.heldout(domain)[:texts])
        return cls(load_model(directory), pools, encoded)

    def loss(self, domain: str, k: int, pool_of: str | None = None) -> float:
        """Return a domain's loss inside its own pool, or `pool_of`'s, cut to `k` experts per layer.

        When `k` is all of the layer's experts, this is the full model.
        """
        moe_layers = self.model.config.moe_layers
        pool = self.pools[pool_of or domain].cut(k, moe_layers)
        return heldout_loss(self.model, self.texts[domain], pool)

    def mean_loss(self, k: int) -> float:
        """Return the mean over the domains of `loss(domain, k)`."""
        return sum(self.loss(domain, k) for domain in self.texts) / len(self.texts)
