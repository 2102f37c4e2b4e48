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
    """The KV cache of one worker on a CPU, and where its memory is.

    One block of the cache holds `block_tokens` tokens of all layers in `block_bytes`. `kv_flag`
    names the flag or variable that sets the cache to `kv_bytes`; both are None if the user gives
    none. `nodes` has the memory node that vLLM binds each worker to.
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
    """The bytes of one activation, the number of workers, and on a CPU what memory they need."""

    dtype_bytes: int
    num_ranks: int
    cpu: CpuSizes | None = None
