"""What an operator reads when the server is up: memory, slots, pools, the URL, a line to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_serve.config import format_gib
from emo_serve.server.startup.address import ServerAddress
from emo_serve.server.startup.memory import MemoryPlan
from emo_serve.server.vllm_adapter.worker_calls import EngineFacts

__all__ = ["PoolLine", "Summary", "format_summary"]


@dataclass(frozen=True)
class PoolLine:
    """One pool in the summary; `state` is "resident" or says why it is not.

    `experts_per_layer` has 0 for a dense layer.
    """

    name: str
    experts_per_layer: tuple[int, ...]
    state: str
    is_default: bool = False


@dataclass(frozen=True)
class Summary:
    """Everything the start-up summary says.

    `experts_per_layer` is the model's, 0 for a dense layer. `memory` is the plan of a CPU's memory,
    None where vLLM divides a device's. `cache_tokens` is what the KV cache holds. `refused` says
    why pool files were left out; `try_model` is the model name in the line to try.
    """

    model: str
    facts: EngineFacts
    memory: MemoryPlan | None
    cache_tokens: int
    max_model_len: int
    experts_per_layer: tuple[int, ...]
    slots_per_layer: int
    stream_slots: int
    pools_source: Path | None
    pools: tuple[PoolLine, ...]
    refused: tuple[str, ...]
    address: ServerAddress
    try_model: str


def format_summary(summary: Summary) -> str:
    """Return the summary as lines of text."""
    facts = summary.facts
    experts = [count for count in summary.experts_per_layer if count]
    width = max(len(pool.name) for pool in summary.pools)
    dtypes = facts.dtype
    if facts.expert_dtype != facts.dtype:
        dtypes += f", experts in {facts.expert_dtype}"
    lines = [
        f"emo-serve: {summary.model} is ready ({dtypes}, expert backend: {facts.moe_backend})",
        *_memory_lines(summary),
        f"  experts  {_range(experts)} x {len(experts)} MoE layers"
        if experts
        else "  experts  none: a dense model, whose only pool is the base pool",
        f"  pools    {summary.pools_source or 'no --pools directory'}",
    ]
    for pool in summary.pools:
        counts = [count for count in pool.experts_per_layer if count]
        default = "  (default)" if pool.is_default else ""
        lines.append(
            f"    {pool.name:<{width}}  {_range(counts):>7} experts per layer"
            f"  {pool.state}{default}"
        )
    lines += [f"    refused: {reason}" for reason in summary.refused]
    lines.append(f"  URL      {summary.address.url}/v1")
    lines.append(f"  try      {summary.address.curl(summary.try_model)}")
    if summary.address.uds is None:
        lines.append(f"  console  {summary.address.url}/console")
    return "\n".join(lines)


def _memory_lines(summary: Summary) -> list[str]:
    """Return the account of memory, and for what was chosen, the flag that changes it."""
    facts, memory = summary.facts, summary.memory
    rank = " per device" if facts.num_ranks > 1 else ""
    slab_note = cache_note = ""
    if memory is not None and memory.slots_flag is None:
        slab_note = (
            f"; chosen, change it with --expert-slots or --expert-memory{_need_note(memory)}"
        )
    if memory is not None and memory.kv_flag is None:
        cache_note = "; chosen, change it with --kv-cache-memory-bytes"
    contexts = summary.cache_tokens / summary.max_model_len
    lines = [
        f"  trunk    {format_gib(facts.trunk_bytes)}{rank}",
        f"  slab     {format_gib(facts.slab_bytes)}{rank}: {summary.slots_per_layer} slots per"
        f" layer{_stream_note(summary)}, {format_gib(facts.slot_bytes)} each{slab_note}",
        f"  KV cache {format_gib(facts.kv_cache_bytes)}{rank}: {summary.cache_tokens} tokens,"
        f" {contexts:.1f} contexts of {summary.max_model_len}{cache_note}",
    ]
    if not any(summary.experts_per_layer):
        del lines[1]  # no slab
    if memory is None:
        return lines
    if memory.need.host_expert_bytes:
        size = format_gib(memory.need.host_expert_bytes)
        lines.append(f"  host     {size} for experts that were read once, at most")
    processes = format_gib(memory.need.process_bytes)
    lines.append(f"  process  {processes} kept for the processes: libraries and activations")
    if memory.limit is not None:
        lines.append(
            f"  memory   {format_gib(memory.total_bytes)} of {format_gib(memory.limit.free_bytes)}"
            f" that was free ({memory.limit.name})"
        )
    return lines


def _stream_note(summary: Summary) -> str:
    """Say how many slots there are for pools that do not fit."""
    count = summary.stream_slots
    return f" and {count} to stream pools that do not fit" if count else ""


def _need_note(memory: MemoryPlan) -> str:
    """Say if not every pool can be loaded."""
    every = memory.need.pools.every
    return "" if memory.num_slots >= every else f" (every pool needs {every})"


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
