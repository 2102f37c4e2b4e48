"""What emo-serve needs to know of a model, whatever its family: sizes, routing, tensor names.

A family is a kind of checkpoint: EMO, OLMoE, Qwen3-MoE and so on. Pools, residency, the expert
store and the front end read these facts; only what runs or writes a model by itself reads EMO's
config. Plain values: no torch, no transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["MATRICES", "ExpertNames", "ModelFacts", "MoeLayer"]

MATRICES = ("gate", "up", "down")
"""The matrices of an expert."""


@dataclass(frozen=True)
class MoeLayer:
    """What routing needs to know about one MoE layer.

    Expert ids run from 0 to num_experts - 1; the last `num_shared_experts` of them are shared.
    `top_k` counts all experts a token takes, shared and always-active ones included.
    """

    num_experts: int
    num_shared_experts: int
    always_active: tuple[int, ...]
    top_k: int

    @property
    def implied(self) -> frozenset[int]:
        """Return the ids that belong to every pool: shared and always-active experts."""
        shared = range(self.num_experts - self.num_shared_experts, self.num_experts)
        return frozenset(shared) | frozenset(self.always_active)

    @property
    def smallest_pool(self) -> tuple[int, ...]:
        """Return the smallest possible pool: the implied experts, or expert 0 if there are none."""
        return tuple(sorted(self.implied)) or (0,)

    @property
    def num_standard_experts(self) -> int:
        """Return how many experts, the lowest ids, share the softmax that a pool's mask changes."""
        return self.num_experts - (0 if self.always_active else self.num_shared_experts)


@dataclass(frozen=True)
class ExpertNames:
    """The names of gate and expert tensors; `block` is the layer's module that holds them.

    An expert is three tensors, `model.layers.L.BLOCK.experts.E.NAME.weight`.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def expert(self, layer: int, expert: int, matrix: str) -> str:
        """Return the name of an expert's matrix: 'gate', 'up' or 'down'."""
        name = getattr(self, matrix)
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{name}.weight"

    def router(self, layer: int) -> str:
        """Return the name of a MoE layer's gate."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def parse(self, name: str) -> tuple[int, int, str] | None:
        """Return (layer, expert, matrix) of an expert's tensor, None for the trunk's."""
        match = self._pattern.fullmatch(name)
        return None if match is None else (int(match[1]), int(match[2]), self._matrices[match[3]])

    @cached_property
    def _matrices(self) -> dict[str, str]:
        return {getattr(self, matrix): matrix for matrix in MATRICES}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(
            rf"model\.layers\.(\d+)\.{re.escape(self.block)}\.experts\.(\d+)"
            rf"\.({'|'.join(map(re.escape, self._matrices))})\.weight"
        )


@dataclass(frozen=True)
class ModelFacts:
    """One model: `expert_width` is the inner size of an expert, 0 if no layer has any.

    `moe_layers` has one entry per layer, None for a dense one. `norm_topk_prob` says that the
    weights of the experts a token takes are made to sum to 1. `architecture` is the vLLM model
    that serves it with pools, None for the one that its config names. `has_reference` says that
    emo-serve has a model of its own that can run this checkpoint without a server: for builds and
    exports of pools.
    """

    family: str
    vocab_size: int
    hidden_size: int
    expert_width: int
    max_position_embeddings: int
    moe_layers: tuple[MoeLayer | None, ...]
    norm_topk_prob: bool
    architecture: str | None = None
    names: ExpertNames = field(default_factory=ExpertNames)
    has_reference: bool = False

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Return the number of experts of each layer, 0 for a dense one."""
        return tuple(moe.num_experts if moe else 0 for moe in self.moe_layers)

    def expert_names(self) -> Iterator[str]:
        """Yield the name of every expert's tensor, layer by layer."""
        for layer, count in enumerate(self.experts_per_layer):
            for expert in range(count):
                for matrix in MATRICES:
                    yield self.names.expert(layer, expert, matrix)

    @property
    def is_dense(self) -> bool:
        """Tell whether no layer has experts: then the only pool is the base pool, of none."""
        return not any(self.moe_layers)

    @property
    def first_moe_layer(self) -> int | None:
        """Return the index of the first layer that has experts, None if all are dense."""
        indices = (index for index, moe in enumerate(self.moe_layers) if moe is not None)
        return next(indices, None)
