"""Expert stores on a golden checkpoint, with stand-ins for what an engine would hold."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.vllm_plugin.backends import MoeBackend, ReferenceBackend
from emo_serve.vllm_plugin.expert_store import ExpertShape, ExpertStore, HostMemory, PackedExpert

HIDDEN, WIDTH = 128, 64  # of every golden checkpoint
T = TypeVar("T")


def make_store(
    directory: Path,
    *,
    host_experts: float = 0,
    dtype: torch.dtype = torch.bfloat16,
    backend: MoeBackend | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    piece_bytes: int = 4096,
) -> tuple[ExpertStore, ExpertShape]:
    """Return one rank's store, with host memory for so many experts."""
    shape = ExpertShape(HIDDEN, WIDTH // num_ranks, dtype, rank)
    host = HostMemory(int(host_experts * shape.num_bytes), shape, is_pinned=False)
    backend = backend or ReferenceBackend()
    return ExpertStore(Checkpoint.open(directory), backend, shape, host, piece_bytes), shape


class Slab:
    """Slots of one layer."""

    def __init__(self, shape: ExpertShape, num_slots: int) -> None:
        self.w13 = torch.zeros(num_slots, 2 * shape.width, shape.hidden_size, dtype=shape.dtype)
        self.w2 = torch.zeros(num_slots, shape.hidden_size, shape.width, dtype=shape.dtype)

    def slot(self, layer: int, number: int) -> PackedExpert:
        """Return the memory of a slot; there is one layer's worth, whichever is asked for."""
        return PackedExpert(self.w13[number], self.w2[number])


def spare(shape: ExpertShape) -> PackedExpert:
    """Return memory for one expert."""
    return shape.view(torch.zeros(shape.num_bytes, dtype=torch.uint8))


def exhaust(steps: Generator[None, None, T]) -> tuple[T, int]:
    """Take every step; return what the generator returns and how many steps there were."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1


def expected(
    tensors: dict[str, Tensor], layer: int, expert: int, rank: int = 0, num_ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return w13 and w2 as the checkpoint has them, one rank's part."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    gate, up = (
        tensors[f"{prefix}{matrix}_proj.weight"].chunk(num_ranks)[rank] for matrix in ("gate", "up")
    )
    down = tensors[f"{prefix}down_proj.weight"].chunk(num_ranks, dim=1)[rank]
    return torch.cat([gate, up]), down
