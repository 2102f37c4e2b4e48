"""Run as a program: one engine on the golden checkpoint, pools mixed; prints JSON on its last line.

    python -m tests.vllm_plugin.golden_run CHECKPOINT '{"tensor_parallel_size": 2}'

A process of its own, because vLLM reads the environment (model runner, thread binding) on import.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tests.golden.checkpoints import golden
from tests.vllm_plugin.engines import PooledEngine, pooled_engine


def worst_difference(engine: PooledEngine) -> float:
    """Return the largest distance from the golden log-probabilities, all pools in one batch."""
    requests = [(pool, ids) for ids in golden().prompts for pool in engine.rows]
    expected = [golden().prompt_logprobs[pool][row] for row in range(3) for pool in engine.rows]
    got = engine.prompt_logprobs(requests)
    pairs = zip(got, expected, strict=True)
    return max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def golden_pools() -> dict[str, list[list[int]]]:
    """Return the golden pools with the full model as the first, the base pool's row."""
    return {"full": [list(range(32))] * 3, **golden().pools}


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


def main(directory: str, engine_args: str) -> None:
    """Start, compare, load everything anew, compare, describe."""
    with pooled_engine(Path(directory), golden_pools(), **json.loads(engine_args)) as engine:
        worst = worst_difference(engine)
        move_every_expert(engine)
        worst_moved = worst_difference(engine)
        ranks = engine.call("emo_describe")
        print(json.dumps({"worst": worst, "worst_moved": worst_moved, "ranks": ranks}))


if __name__ == "__main__":
    main(*sys.argv[1:])
