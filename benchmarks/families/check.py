"""Check every family on a real server: tiny random models, pools mixed, against transformers.

    python -m benchmarks.families.check                       # V1 runner, eager
    python -m benchmarks.families.check --compiled
    python -m benchmarks.families.check --runner v2           # in Triton's interpreter
    python -m benchmarks.families.check --ranks 2
    python -m benchmarks.families.check --write DIRECTORY     # only write the checkpoints and pools

For each family it writes a checkpoint and three pools, starts `emo-serve serve` with fewer slots
than the model has experts, asks for the same prompts in every pool at once, and prints the largest
difference of any prompt token's log-probability from transformers' on the model with all other
experts sliced away. A difference above 1e-4 nats ends it with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.families.models import MODELS, write_checkpoint
from benchmarks.families.oracle import Pool, expected_logprobs, pools_of, prompts
from benchmarks.harness.progress import say, steps
from benchmarks.harness.servers import ServerProcess

__all__ = ["TOLERANCE", "main", "write_pools"]

TOLERANCE = 1e-4
_V2_ON_CPU = Path(__file__).resolve().parents[2] / "tests" / "engine" / "plugin" / "v2_on_cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Check the families asked for; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    parser.add_argument("--ranks", type=int, default=1, help="--tensor-parallel-size")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--write", type=Path, help="write checkpoints and pools here, and end")
    arguments = parser.parse_args(argv)
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.write or Path(scratch)
        say("family      slots of experts  pools' experts  worst difference, nats")
        for family in steps(arguments.families, "families"):
            model = MODELS[family]
            directory = write_checkpoint(family, root / family)
            write_pools(pools_of(family), root / f"{family}-pools")
            if arguments.write:
                continue
            found = _worst(family, directory, root / f"{family}-pools", arguments)
            worst = max(worst, found)
            slots = f"{model.slots} of {model.num_experts}" if model.slots else "dense"
            sizes = ", ".join(map(str, model.pool_sizes)) or "base"
            say(f"{family:<11} {slots:<17} {sizes:<15} {found:.1e}")
    return int(worst > TOLERANCE)


def write_pools(pools: dict[str, Pool], directory: Path) -> None:
    """Write a pool file per pool that is not the base pool."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, layers in pools.items():
        if name == "base":
            continue
        entries = [{"experts": ids} if ids else None for ids in layers]
        document = {"format": "emo-pool/1", "name": name, "layers": entries}
        (directory / f"{name}.json").write_text(json.dumps(document))


def _worst(family: str, directory: Path, pools_dir: Path, arguments: argparse.Namespace) -> float:
    pools, texts = pools_of(family), prompts(arguments.prompts)
    command = [sys.executable, "-m", "emo_serve", "serve", str(directory)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128"]
    command += ["--max-num-batched-tokens", "256", "--max-num-seqs", "16"]
    command += ["--tensor-parallel-size", str(arguments.ranks)]
    if not arguments.compiled:
        command.append("--enforce-eager")
    if MODELS[family].slots:
        slots = str(MODELS[family].slots)
        command += ["--pools", str(pools_dir), "--expert-slots", slots, "--default-pool", "a"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if arguments.runner == "v2":
        variables |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        variables["PYTHONPATH"] = ":".join([str(_V2_ON_CPU), *_python_path()])
    log = directory / "server.log"
    with log.open("wb") as errors, ServerProcess(command, None, variables, errors=errors) as server:
        got = asyncio.run(_answers(server.url, pools, texts))
    expected = expected_logprobs(family, directory, pools, texts)
    return max(
        abs(a - b)
        for pool in pools
        for mine, theirs in zip(got[pool], expected[pool], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def _python_path() -> list[str]:
    root = Path(__file__).resolve().parents[2]
    return [str(root), str(root / "kernels")]


async def _answers(
    url: str, pools: dict[str, Pool], texts: Sequence[Sequence[int]]
) -> dict[str, list[list[float]]]:
    """Ask for every prompt in every pool at once; return the prompts' log-probabilities."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(pool: str, ids: Sequence[int]) -> list[float]:
            body: dict[str, Any] = {"model": pool, "prompt": list(ids), "max_tokens": 1}
            answer = await client.post("/v1/completions", json={**body, "prompt_logprobs": 0})
            answer.raise_for_status()
            entries = answer.json()["choices"][0]["prompt_logprobs"][1:]
            return [
                float(entry[str(token)]["logprob"])
                for entry, token in zip(entries, ids[1:], strict=True)
            ]

        found = await asyncio.gather(*(ask(pool, ids) for ids in texts for pool in pools))
    by_pool: dict[str, list[list[float]]] = {pool: [] for pool in pools}
    for place, each in enumerate(found):
        by_pool[list(pools)[place % len(pools)]].append(each)
    return by_pool


if __name__ == "__main__":
    sys.exit(main())
