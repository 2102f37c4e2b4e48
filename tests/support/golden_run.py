"""Run as a program: engines on the golden checkpoint, pools mixed; prints JSON on its last line.

    python -m tests.support.golden_run CHECKPOINT '[{"moe_backend": "triton"}]' [--short]

A process of its own, because vLLM reads the environment (model runner, thread binding) on import.
With `--short` it asks for the first tokens of one prompt at a time, which is enough to check one
more engine: Triton's interpreter takes about 10 ms per token and layer for routing alone.

There are no golden values for experts in fp8. They are compared with the reference model, whose
weights are rounded to what the slots hold.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emo_kernels import quantize
from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM
from tests.support.golden.checkpoints import golden
from tests.support.offline_engine import PooledEngine, chosen_logprobs, pooled_engine
from tests.unit.emo.test_model import logprobs, masks

SHORT: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
"""Engine arguments for 16 tokens of each of four pools, in one step; vLLM profiles 64 tokens."""

TOLERANCE = 1e-3  # nats per token in float32, as asked; a few 1e-6 are met

Logprobs = dict[str, list[list[float]]]
"""For each pool, of each golden prompt, the log-probability of every token after the first."""


def worst_difference(
    engine: PooledEngine,
    expected: Logprobs | None = None,
    prompts: Sequence[int] = (0, 1, 2),
    num_tokens: int = 40,
) -> float:
    """Return the largest distance from the golden log-probabilities, all pools in one batch."""
    expected = expected or golden().prompt_logprobs
    asked = [(pool, row) for row in prompts for pool in engine.rows]
    got = engine.prompt_logprobs(
        [(pool, golden().prompts[row][:num_tokens]) for pool, row in asked]
    )
    differences = [
        a - b
        for (pool, row), mine in zip(asked, got, strict=True)
        for a, b in zip(mine, expected[pool][row][: num_tokens - 1], strict=True)
    ]
    return float(np.abs(differences).max())  # nan if any is


def golden_pools() -> dict[str, list[list[int]]]:
    """Return the golden pools with the full model as the first, the base pool's row."""
    return {"full": [list(range(32))] * 3, **golden().pools}


def assert_greedy(
    model: EmoForCausalLM, pool: str, prompt: list[int], tokens: Sequence[int]
) -> list[float]:
    """Assert that the reference would have chosen each of these tokens; return their logprobs.

    A tie within the tolerance counts: two implementations may break it differently.
    """
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(ids, pool=masks(golden_pools()[pool], "shared1"))
    scores = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() < TOLERANCE, (pool, list(tokens))
    return chosen.tolist()  # type: ignore[no-any-return]


def quantised_logprobs(directory: Path) -> Logprobs:
    """Return the reference model's log-probabilities with its experts rounded to fp8."""
    model = load_model(directory)
    for name, weight in model.named_parameters():
        if name.endswith((".mlp.w13", ".mlp.w2")):
            values, scales = quantize(weight.data)
            weight.data = values.float() * scales[..., None]
    return {
        name: logprobs(model, golden().prompts, pool=masks(pool, "shared1")).tolist()
        for name, pool in golden_pools().items()
    }


def worst_generated(
    engine: PooledEngine,
    model: EmoForCausalLM,
    requests: Sequence[tuple[str, list[int]]],
    num_tokens: int,
) -> float:
    """Let the engine answer (pool, prompt) greedily; return the largest distance from `model`."""
    params = [
        engine.params(pool, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
        for pool, _ in requests
    ]
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    differences = []
    for (pool, ids), output in zip(requests, outputs, strict=True):
        answer = output.outputs[0]
        assert len(answer.token_ids) == num_tokens
        chosen = assert_greedy(model, pool, ids, answer.token_ids)
        got = chosen_logprobs(answer.logprobs, answer.token_ids)
        differences.append(np.subtract(got, chosen))
    return float(np.abs(differences).max())  # nan if any is


def num_drafts(engine: PooledEngine) -> tuple[float, float]:
    """Return how many tokens were drafted, and how many of them accepted."""
    values = {metric.name: metric for metric in engine.llm.get_metrics()}
    drafted, accepted = (
        values[f"vllm:spec_decode_num_{what}_tokens"].value for what in ("draft", "accepted")
    )
    return drafted, accepted


def move_every_expert(engine: PooledEngine) -> None:
    """Load every expert again, into slots drawn at random, in random order."""
    rng = random.Random(1)
    copies = [
        [layer, expert, slot]
        for layer in range(3)
        for expert, slot in enumerate(rng.sample(range(32), 32))
    ]
    rng.shuffle(copies)
    engine.load(copies, engine.rows["full"], golden_pools()["full"])


def run(directory: Path, args: dict[str, Any], *, is_short: bool) -> dict[str, Any]:
    """Start, compare, load every expert again, compare, describe."""
    is_fp8 = args.get("expert_dtype", "auto") != "auto"
    expected = quantised_logprobs(directory) if is_fp8 else golden().prompt_logprobs
    every: tuple[tuple[int, ...], int] = ((0, 1, 2), 40)
    before, after = (((0,), 16), ((1,), 16)) if is_short else (every, every)
    args = {**(SHORT if is_short else {}), **args}
    with pooled_engine(directory, golden_pools(), **args) as engine:
        worst = worst_difference(engine, expected, *before)
        move_every_expert(engine)
        worst_moved = worst_difference(engine, expected, *after)
        ranks = engine.call("emo_describe")
        usage = {pool: engine.call("emo_usage", kept, 1.0) for pool, kept in golden_pools().items()}
        result = {"worst": worst, "worst_moved": worst_moved, "ranks": ranks, "usage": usage}
        if "speculative_config" in args:
            requests = [(pool, golden().prompts[0][:16] * 2) for pool in engine.rows]
            result["worst_generated"] = worst_generated(
                engine, load_model(directory), requests, num_tokens=24
            )
            result["drafted"], result["accepted"] = num_drafts(engine)
    return result


def main(directory: str, runs: str, *flags: str) -> None:
    """Do all runs, one after the other, in this process."""
    is_short = "--short" in flags
    results = [run(Path(directory), args, is_short=is_short) for args in json.loads(runs)]
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
