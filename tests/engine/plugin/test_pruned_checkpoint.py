"""An exported pool in a plain vLLM engine, which knows of no pools, gives the golden values."""

from __future__ import annotations

from pathlib import Path

import pytest

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.pools.pruned.checkpoint import export_pool
from tests.support.golden.checkpoints import golden, write_checkpoint
from tests.support.golden_run import TOLERANCE
from tests.support.offline_engine import chosen_logprobs, started_engine

pytestmark = pytest.mark.vllm


def test_golden_values_of_the_pool(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint("shared1", tmp_path / "model"))
    layers = tuple(LayerExperts(tuple(ids)) for ids in golden().pools["math"])
    export_pool(ExpertPool("math", layers), checkpoint, tmp_path / "out")
    with started_engine(tmp_path / "out") as llm:
        params = llm.get_default_sampling_params()
        params.temperature, params.max_tokens, params.prompt_logprobs = 0.0, 1, 0
        prompts = [{"prompt_token_ids": ids} for ids in golden().prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, ids, want in zip(
        outputs, golden().prompts, golden().prompt_logprobs["math"], strict=True
    ):
        got = chosen_logprobs(output.prompt_logprobs[1:], ids[1:])
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < TOLERANCE
