"""What vLLM's flags mean in bytes and tokens, known before an engine is started."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CpuSizes", "EngineSizes", "MemoryShare"]


@dataclass(frozen=True)
class MemoryShare:
    """What --gpu-memory-utilization, given by the user, means for one worker on a CPU.

    `asked_bytes` is that share of the worker's memory node, of which `free_bytes` are free.
    """

    flag: str
    asked_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class CpuSizes:
    """The KV cache on a CPU, and where its memory is.

    One block of the cache holds `block_tokens` tokens of all layers, on one rank of each stage, in
    `block_bytes`. `kv_flag` names the flag or variable that sets a worker's to `kv_bytes`; both are
    None if the user gives none. `nodes` has the memory node that vLLM binds each worker to.
    """

    block_tokens: int
    block_bytes: int
    max_model_len: int
    max_num_seqs: int
    kv_flag: str | None
    kv_bytes: int | None
    share: MemoryShare | None
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class EngineSizes:
    """The bytes of one activation, the workers, and on a CPU what memory they need.

    `num_ranks` workers compute each stage of the pipeline, which has so many `layers_per_stage`.
    """

    dtype_bytes: int
    num_ranks: int
    cpu: CpuSizes | None = None
    layers_per_stage: tuple[int, ...] = (1,)

    @property
    def num_workers(self) -> int:
        """Return the number of workers of all stages."""
        return self.num_ranks * len(self.layers_per_stage)

    def kv_bytes_of_all(self, worker_bytes: int) -> int:
        """Return the KV cache of all workers, where those of the longest stage have so much."""
        longest, layers = max(self.layers_per_stage), sum(self.layers_per_stage)
        return worker_bytes * self.num_ranks * layers // longest

    def kv_bytes_of_one(self, all_bytes: int) -> int:
        """Return what a worker of the longest stage has of the KV cache of all."""
        longest, layers = max(self.layers_per_stage), sum(self.layers_per_stage)
        return all_bytes // self.num_ranks * longest // layers
