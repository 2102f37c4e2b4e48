"""Expert stores on a golden checkpoint, with stand-ins for what an engine would hold."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.vllm_plugin.backends import MoeBackend, ReferenceBackend
from emo_serve.vllm_plugin.expert_store import ExpertStore, HostMemory
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert, Slab

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
    """Return one rank's store, with host memory for `host_experts` experts, and its shape."""
    backend = backend or ReferenceBackend()
    shape = ExpertShape(HIDDEN, WIDTH // num_ranks, backend.slab_dtype(dtype), rank)
    host = HostMemory(int(host_experts * shape.num_bytes), shape, is_pinned=False)
    return ExpertStore(Checkpoint.open(directory), backend, shape, host, piece_bytes), shape


def slots_of(slab: Slab) -> Callable[[int, int], PackedExpert]:
    """Return a function that finds a slot by layer and number; all layers share one slab."""
    return lambda layer, number: slab.slot(number)


def packed(backend: MoeBackend, shape: ExpertShape, weights: tuple[Tensor, Tensor]) -> PackedExpert:
    """Return an expert whose matrices were packed whole."""
    memory = spare(shape)
    for out, weight in zip((memory.w13, memory.w2), weights, strict=True):
        backend.pack_into(out, weight)
    return memory


def are_equal(one: PackedExpert, other: PackedExpert) -> bool:
    """Compare weights and scales, bit for bit."""
    return all(map(torch.equal, one.tensors(), other.tensors()))


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
