"""How much a running engine can compute at once, and the bound on admitted work that follows."""

from __future__ import annotations

from typing import Any

from emo_serve.residency.backlog import BacklogLimits

__all__ = ["backlog_limits", "cache_tokens", "max_sequences"]

_TYPICAL_TOKENS = (
    1024  # prompt and completion of a sequence, for the share of the KV cache it takes
)
_QUEUED_PER_RUNNING = 4
_MIN_QUEUED = 256  # as --max-waiting: a burst of so many is served, however small the batch


def max_sequences(engine: Any) -> int:
    """Return vLLM's --max-num-seqs: the sequences in one batch, at most."""
    return int(engine.vllm_config.scheduler_config.max_num_seqs)


def cache_tokens(engine: Any) -> int:
    """Return the tokens that the KV cache of an engine that has started holds."""
    cache = engine.vllm_config.cache_config
    return int((cache.num_gpu_blocks or 0) * cache.block_size)


def backlog_limits(engine: Any, max_queued: int | None) -> BacklogLimits:
    """Return the bound for an engine that has started; `max_queued` None derives it.

    The engine runs as many sequences as its batch takes and its KV cache holds, if each takes
    _TYPICAL_TOKENS or the whole context, whichever is less.
    """
    config = engine.vllm_config
    tokens = min(_TYPICAL_TOKENS, config.model_config.max_model_len)
    running = max(1, min(max_sequences(engine), cache_tokens(engine) // tokens))
    if max_queued is None:
        max_queued = max(_MIN_QUEUED, _QUEUED_PER_RUNNING * running)
    return BacklogLimits(running, max_queued)
