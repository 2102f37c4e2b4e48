"""The bound on admitted work that follows from an engine's batch and KV cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emo_serve.residency.backlog import BacklogLimits
from emo_serve.server.vllm_adapter.capacity import backlog_limits, cache_tokens, max_sequences


def an_engine(max_num_seqs: int, num_gpu_blocks: int | None, max_model_len: int = 4096) -> Any:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        cache_config=SimpleNamespace(num_gpu_blocks=num_gpu_blocks, block_size=16),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    return SimpleNamespace(vllm_config=config)


@pytest.mark.parametrize(
    ("engine", "max_queued", "expected"),
    [
        (an_engine(256, 100_000), None, BacklogLimits(256, 1024)),  # the batch is the limit
        (an_engine(256, 6400), None, BacklogLimits(100, 400)),  # the KV cache is
        (an_engine(256, 6400, max_model_len=512), None, BacklogLimits(200, 800)),
        (an_engine(8, 6400), None, BacklogLimits(8, 256)),
        (an_engine(8, 6400), 0, BacklogLimits(8, 0)),
        (an_engine(8, None), 3, BacklogLimits(1, 3)),
    ],
)
def test_the_bound_follows_from_batch_and_cache(
    engine: Any, max_queued: int | None, expected: BacklogLimits
) -> None:
    assert backlog_limits(engine, max_queued) == expected


def test_n_may_fill_the_batch() -> None:
    assert max_sequences(an_engine(256, 6400)) == 256


def test_the_cache_holds_whole_blocks() -> None:
    assert cache_tokens(an_engine(256, 6400)) == 6400 * 16
    assert cache_tokens(an_engine(256, None)) == 0
