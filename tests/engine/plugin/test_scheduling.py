"""Requests keep their pools when vLLM chunks prompts, preempts, and reuses prefixes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from emo_serve.emo.model import EmoForCausalLM
from tests.support.golden.checkpoints import golden
from tests.support.golden_run import TOLERANCE, assert_greedy, golden_pools, worst_difference
from tests.support.offline_engine import (
    PooledEngine,
    pooled_engine,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def tight(shared1: Path) -> Iterator[PooledEngine]:
    """An engine that must chunk prompts, reuse prefixes and preempt: few tokens, few blocks."""
    with pooled_engine(
        shared1,
        golden_pools(),
        max_num_batched_tokens=24,
        block_size=32,
        num_gpu_blocks_override=14,
        max_model_len=256,
        enable_prefix_caching=True,
        disable_log_stats=False,
    ) as engine:
        yield engine
    gc.collect()


def metric(engine: PooledEngine, name: str) -> float:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == name)


def test_golden_values_chunked(tight: PooledEngine) -> None:
    assert worst_difference(tight) < TOLERANCE  # 40-token prompts, 24 tokens a step


def test_preempted_requests_keep_their_pools(
    tight: PooledEngine, reference: EmoForCausalLM
) -> None:
    before = metric(tight, "vllm:num_preemptions")
    requests = [(pool, ids) for ids in golden().prompts for pool in tight.rows]
    params = [tight.params(pool, max_tokens=40, ignore_eos=True) for pool, _ in requests]
    prompts = [{"prompt_token_ids": ids, "cache_salt": pool} for pool, ids in requests]
    outputs = tight.llm.generate(prompts, params, use_tqdm=False)
    assert metric(tight, "vllm:num_preemptions") > before, "the test no longer preempts"
    for (pool, ids), output in zip(requests, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == 40
        assert_greedy(reference, pool, ids, output.outputs[0].token_ids)


def test_prefixes_are_reused_within_a_salt_only(
    tight: PooledEngine, reference: EmoForCausalLM
) -> None:
    prompt = (golden().prompts[0] + golden().prompts[1])[:64]

    def run(pool: str) -> int:
        request = {"prompt_token_ids": prompt, "cache_salt": pool}
        params = tight.params(pool, max_tokens=4)
        (output,) = tight.llm.generate(request, params, use_tqdm=False)
        assert_greedy(reference, pool, prompt, output.outputs[0].token_ids)
        return int(output.num_cached_tokens)

    tight.llm.reset_prefix_cache()
    assert [run("math"), run("math"), run("code"), run("math")] == [0, 32, 0, 32]
