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
from tests.support.golden_run import TOLERANCE, golden_pools
from tests.support.progress import START_SECONDS, Activity, wait_for

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[3]
V2 = {
    "PYTHONPATH": str(Path(__file__).parent / "v2_on_cpu"),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


def run_golden(
    directory: Path, runs: list[dict[str, Any]], env: dict[str, str], *flags: str
) -> list[dict[str, Any]]:
    """Return the result of each run; all in one process of their own, one after the other."""
    write_checkpoint("shared1", directory)
    out, err = directory / "out", directory / "err"
    command = [sys.executable, "-m", "tests.support.golden_run", str(directory)]
    command += [json.dumps(runs), *flags]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=stdout, stderr=stderr
        )
    activity = Activity(process.pid, [out, err])
    try:
        wait_for(lambda: process.poll() is not None, activity, START_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, activity.last_words()
    answers = [line for line in out.read_text().splitlines() if line.startswith('[{"worst"')]
    results: list[dict[str, Any]] = json.loads(answers[-1])
    return results


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


@pytest.fixture(scope="module")
def v2_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The V2 runner's results by backend."""
    runs = [{"moe_backend": "cpu"}, {"moe_backend": "triton"}]
    results = run_golden(tmp_path_factory.mktemp("v2"), runs, V2, "--short")
    return {result["ranks"][0]["moe_backend"]: result for result in results}


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_v2_model_runner_under_the_interpreter(
    v2_runs: dict[str, dict[str, Any]], backend: str
) -> None:
    result = v2_runs[backend]
    (rank,) = result["ranks"]
    assert (rank["model_runner"], rank["moe_backend"]) == ("v2", backend)
    assert rank["routes_by_pool"]
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE
    check_usage(result, num_tokens=2 * 16)


def test_drafts_on_the_v2_runner(tmp_path: Path) -> None:
    """N-grams; unlike on the V1 runner, vLLM's own kernel drafts them."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1}
    run = {"moe_backend": "cpu", "speculative_config": drafts, "disable_log_stats": False}
    (result,) = run_golden(tmp_path, [run], V2, "--short")
    assert result["ranks"][0]["model_runner"] == "v2"
    for key in ("worst", "worst_moved", "worst_generated"):
        assert result[key] < TOLERANCE, key
    assert 0 < result["accepted"] < result["drafted"], "both must happen"


SLOT_BYTES = {
    "auto": 3 * 64 * 128 * 4,
    "fp8_e4m3": 3 * 64 * 128 + 4 * (2 * 64 + 128),
}


@pytest.fixture(scope="module")
def triton_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of our kernels by the dtype of experts."""
    runs = [
        {"moe_backend": "triton", "expert_dtype": dtype, "host_expert_bytes": 50 * slot_bytes}
        for dtype, slot_bytes in SLOT_BYTES.items()
    ]
    env = {"TRITON_INTERPRET": "1"}
    results = run_golden(tmp_path_factory.mktemp("triton"), runs, env, "--short")
    return dict(zip(SLOT_BYTES, results, strict=True))


@pytest.mark.parametrize(
    ("expert_dtype", "held_in"), [("auto", "float32"), ("fp8_e4m3", "float8_e4m3fn")]
)
def test_triton_kernels_under_the_interpreter(
    triton_runs: dict[str, dict[str, Any]], expert_dtype: str, held_in: str
) -> None:
    result, slot_bytes = triton_runs[expert_dtype], SLOT_BYTES[expert_dtype]
    (rank,) = result["ranks"]
    assert (rank["model_runner"], rank["moe_backend"]) == ("v1", "triton")
    assert (rank["dtype"], rank["expert_dtype"]) == ("float32", held_in)
    assert (rank["slot_bytes"], rank["slab_bytes"]) == (slot_bytes, 96 * slot_bytes)
    assert (rank["host_experts"], rank["host_bytes"]) == (50, 50 * slot_bytes)
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE


def two_cores() -> dict[str, str]:
    """Return the variables that bind two workers to a core each."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def test_pipeline_parallel_over_two_processes(tmp_path: Path) -> None:
    """Two of three layers on the first stage, one on the second; rows and loads reach both."""
    run = {"pipeline_parallel_size": 2, "own_processes": True}
    (result,) = run_golden(tmp_path, [run], two_cores(), "--short")
    assert [rank["stage"] for rank in result["ranks"]] == [0, 1]
    assert [rank["num_slots"] for rank in result["ranks"]] == [[32, 32], [32]]
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE
    assert [rank["disk_reads"] for rank in result["ranks"]] == [2 * 64, 2 * 32]
    for pool, kept in golden_pools().items():
        for layers, rank in ((slice(2), 0), (slice(2, 3), 1)):
            usage = result["usage"][pool][rank]
            assert usage["tokens"] == 2 * 16
            found = [{e for e, n in enumerate(counts) if n} for counts in usage["counts"][layers]]
            assert all(map(set.issubset, found, map(set, kept[layers]))) and all(found)
            assert sum(map(bool, usage["counts"])) == len(found), "and no layer of the other stage"


def test_tensor_parallel_over_two_processes(tmp_path: Path) -> None:
    run = {"tensor_parallel_size": 2, "own_processes": True}
    (result,) = run_golden(tmp_path, [run], two_cores())
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]
    assert {rank["model_runner"] for rank in result["ranks"]} == {"v1"}
    slot_bytes = 3 * 64 * 128 * 4 // 2  # float32, half the width on each rank
    assert [rank["slot_bytes"] for rank in result["ranks"]] == [slot_bytes] * 2
    assert result["worst"] < TOLERANCE and result["worst_moved"] < TOLERANCE
    assert [rank["disk_reads"] for rank in result["ranks"]] == [2 * 96] * 2
    check_usage(result, num_tokens=2 * 3 * 40)
