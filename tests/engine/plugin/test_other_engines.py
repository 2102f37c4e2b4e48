"""Golden values on engines that need a process of their own.

They are the V2 runner, our Triton kernels, and tensor parallelism.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden.checkpoints import write_checkpoint
from tests.support.golden_run import golden_pools

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-3
V2 = {
    "PYTHONPATH": str(Path(__file__).parent / "v2_on_cpu"),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


def run_golden(
    directory: Path, engine_args: dict[str, Any], env: dict[str, str], *flags: str
) -> dict[str, Any]:
    write_checkpoint("shared1", directory)
    command = [sys.executable, "-m", "tests.support.golden_run", str(directory)]
    run = subprocess.run(
        [*command, json.dumps(engine_args), *flags],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    answers = [line for line in run.stdout.splitlines() if line.startswith('{"worst"')]
    result: dict[str, Any] = json.loads(answers[-1])
    return result


def check_usage(result: dict[str, Any], num_tokens: int) -> None:
    """Check that the first rank has recorded every token of every pool, and the others none."""
    for pool, ids in golden_pools().items():
        first, *others = result["usage"][pool]
        assert first["tokens"] == num_tokens
        assert [len(layer) for layer in first["counts"]] == [32] * len(ids)
        for kept, counts in zip(ids, first["counts"], strict=True):
            choices = num_tokens * min(4, len(kept))
            assert sum(counts) == pytest.approx(choices, abs=len(counts) / 2)  # rounded, each
            assert {e for e, count in enumerate(counts) if count} <= set(kept)
        assert not any(rank["tokens"] for rank in others)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_v2_model_runner_under_the_interpreter(tmp_path: Path, backend: str) -> None:
    result = run_golden(tmp_path, {"moe_backend": backend}, V2, "--short")
    (rank,) = result["ranks"]
    assert (rank["model_runner"], rank["moe_backend"]) == ("v2", backend)
    assert rank["routes_by_pool"]
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE
    check_usage(result, num_tokens=2 * 16)


@pytest.mark.parametrize(
    ("expert_dtype", "held_in", "slot_bytes"),
    [
        ("auto", "float32", 3 * 64 * 128 * 4),
        ("fp8_e4m3", "float8_e4m3fn", 3 * 64 * 128 + 4 * (2 * 64 + 128)),
    ],
)
def test_triton_kernels_under_the_interpreter(
    tmp_path: Path, expert_dtype: str, held_in: str, slot_bytes: int
) -> None:
    settings = {
        "moe_backend": "triton",
        "expert_dtype": expert_dtype,
        "host_expert_bytes": 50 * slot_bytes,
    }
    result = run_golden(tmp_path, settings, {"TRITON_INTERPRET": "1"}, "--short")
    (rank,) = result["ranks"]
    assert (rank["model_runner"], rank["moe_backend"]) == ("v1", "triton")
    assert (rank["dtype"], rank["expert_dtype"]) == ("float32", held_in)
    assert (rank["slot_bytes"], rank["slab_bytes"]) == (slot_bytes, 96 * slot_bytes)
    assert (rank["host_experts"], rank["host_bytes"]) == (50, 50 * slot_bytes)
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE


def test_tensor_parallel_over_two_processes(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    result = run_golden(tmp_path, {"tensor_parallel_size": 2}, env)
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert {rank["model_runner"] for rank in result["ranks"]} == {"v1"}
    slot_bytes = 3 * 64 * 128 * 4 // 2  # float32, half the width on each rank
    assert [rank["slot_bytes"] for rank in result["ranks"]] == [slot_bytes] * 2
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE
    assert [rank["disk_reads"] for rank in result["ranks"]] == [2 * 96] * 2
    check_usage(result, num_tokens=2 * 3 * 40)
