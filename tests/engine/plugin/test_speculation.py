"""N-gram speculative decoding: drafted tokens route in the pool of their request, right or wrong.

The engine must also chunk prompts and preempt, so that drafts meet both.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emo_serve.emo.model import EmoForCausalLM
from tests.support.golden.checkpoints import golden
from tests.support.golden_run import (
    TOLERANCE,
    golden_pools,
    num_drafts,
    worst_difference,
    worst_generated,
)
from tests.support.offline_engine import PooledEngine, pooled_engine

pytestmark = pytest.mark.vllm

NUM_DRAFTS = 3


@pytest.fixture(scope="module")
def drafting(shared1: Path) -> Iterator[PooledEngine]:
    """An engine that drafts what followed the last token before, right or wrong."""
    drafts = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 1}
    with pooled_engine(
        shared1,
        golden_pools(),
        speculative_config=drafts,
        max_num_batched_tokens=24,
        block_size=32,
        num_gpu_blocks_override=14,
        max_model_len=256,
        disable_log_stats=False,
    ) as engine:
        yield engine
    gc.collect()


def test_drafts_change_no_answer(drafting: PooledEngine, reference: EmoForCausalLM) -> None:
    assert worst_difference(drafting) < TOLERANCE
    requests = [(pool, ids) for ids in golden().prompts for pool in drafting.rows]
    assert worst_generated(drafting, reference, requests, num_tokens=40) < TOLERANCE
    drafted, accepted = num_drafts(drafting)
    assert 0 < accepted < drafted, "both must happen"
    values = {metric.name: metric for metric in drafting.llm.get_metrics()}
    assert values["vllm:num_preemptions"].value > 0, "the test no longer preempts"


def test_rejected_drafts_are_not_counted(drafting: PooledEngine) -> None:
    before = num_drafts(drafting)
    used = {p: drafting.call("emo_usage", k, 1.0)[0]["tokens"] for p, k in golden_pools().items()}
    prompt = golden().prompts[0][:24] * 2  # so short that none is preempted
    params = [drafting.params(pool, max_tokens=40, ignore_eos=True) for pool in drafting.rows]
    prompts = [{"prompt_token_ids": prompt}] * len(params)
    drafting.llm.generate(prompts, params, use_tqdm=False)
    drafted, accepted = np.subtract(num_drafts(drafting), before)
    assert drafted - accepted > NUM_DRAFTS * len(params), "too few are rejected to tell"
    certain = len(prompt) + 40 - 1  # the last token is not routed; accepted ones after it are
    for pool, kept in golden_pools().items():
        (usage,) = drafting.call("emo_usage", kept, 1.0)
        assert certain <= usage["tokens"] - used[pool] <= certain + NUM_DRAFTS
