"""Where experts live when they hold no slot: the checkpoint's files, mapped and read on demand.

Each rank reads only its own part of an expert's width. The store counts what it reads, which is how
we show that start-up does not read the whole checkpoint.

Shapes: D hidden size, F expert width on this rank.
"""

from __future__ import annotations

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from emo_serve.emo.checkpoint import Checkpoint, ExpertWeights

__all__ = ["ExpertStore", "shard_of"]


class ExpertStore:
    """Read experts of one checkpoint, this rank's part."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.bytes_read = 0

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Return one expert in the checkpoint's dtype; raises CheckpointError."""
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        weights = self._checkpoint.expert(layer, expert, shard=rank, num_shards=ranks)
        self.bytes_read += weights.num_bytes
        return weights


def shard_of(weights: ExpertWeights) -> ExpertWeights:
    """Return this rank's part of a whole expert."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return ExpertWeights(
        weights.gate_FD.chunk(ranks)[rank],
        weights.up_FD.chunk(ranks)[rank],
        weights.down_DF.chunk(ranks, dim=1)[rank],
    )
