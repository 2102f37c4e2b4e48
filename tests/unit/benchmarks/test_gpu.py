"""The one call for a GPU: all of it runs interpreted with torch and triton alone, and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.run import Run
from benchmarks.kernels import stages
from benchmarks.kernels.checks import Findings
from emo_kernels.tuning import load_table, table_path

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
STAGES = ("route", "dispatch", "gate_up", "down", "combine")

# Python imports this in every process first: what a bare GPU machine lacks is lacking here too.
BARE_MACHINE = """
import sys
sys.path[:] = [path for path in sys.path if path not in {installed!r}]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
MISSING = (
    "fastapi",
    "prometheus_client",
    "pydantic",
    "safetensors",
    "tokenizers",
    "tqdm",
    "transformers",
    "vllm",
)


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "bare"
    home.mkdir()
    text = BARE_MACHINE.format(installed=[str(ROOT), str(ROOT / "kernels")], missing=MISSING)
    (home / "sitecustomize.py").write_text(text)
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(home)}


def run_script(environment: dict[str, str], home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "20"]
    command += ["--results", str(home), *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def recorded(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["result"] for line in (home / "gpu.jsonl").read_text().splitlines()]


def test_all_stages_run_on_a_bare_machine_and_are_not_repeated(
    bare_machine: dict[str, str], tmp_path: Path
) -> None:
    real = table_path((8, 0)).read_bytes(), RESULTS.exists() and RESULTS.read_bytes()
    shape = ("--tokens", "3", "--pools", "2x8", "--batches", "5", "--workers", "2")
    printed = run_script(bare_machine, tmp_path / "results", *shape)
    assert "FAILED" not in printed and "DIFFER" not in printed
    assert "calls stand in for: graph, pinned memory, side stream" in printed
    assert "Targets: not judged" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("== ")] == [
        f"{stage}:" for stage in gpu._STAGES
    ]

    results = recorded(tmp_path / "results")
    assert all(found["interpreter"] for found in results)
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for found in results:
        by_stage.setdefault(found["stage"], []).append(found)
    (check,) = by_stage["check"]
    assert check["checked"] > 300 and check["failures"] == check["unanswered"] == []
    for decoded in by_stage["decode"]:  # once more if the tiles for this batch changed
        assert decoded["batch"] == 5 and len(decoded["checks"]) == len(decoded["rows"]) == 4
        for row in decoded["checks"]:
            assert row["step_error"] < 1e-4 and row["twin_error"] < 1e-4
            assert (row["change_from_full"] > 0.02) == (row["case"] != "all 16")
    (loads,) = by_stage["loads"]
    assert all(answer["is_identical"] for answer in loads["answers"].values())
    for tuned in by_stage["tune"]:
        assert tuned["failed"] == [] and tuned["times_us"]["down"]
    for measured, weights in zip(by_stage["measure"], ("16bit", "fp8"), strict=True):
        (row,) = measured["rows"]
        assert (row["tokens"], row["pool"], row["weights"]) == (3, "2x8", weights)
        assert row["layer"]["median_us"] > 0 and set(row["stages"]) == set(STAGES)
        assert ("grouped_mm" in row["ratios"]) == (weights == "16bit")
    rows = load_table(tmp_path / "results" / "sm80.json").rows
    mine = [row for row in rows if row.provenance.startswith("interpreter, ")]
    assert sorted((row.tokens, row.slots, row.weights) for row in mine) == [
        (3, 8, "16bit"),
        (3, 8, "fp8"),
    ]
    assert real == (table_path((8, 0)).read_bytes(), RESULTS.exists() and RESULTS.read_bytes())

    again = run_script(bare_machine, tmp_path / "results", *shape)
    assert "tuned 0 of 2 keys" in again and "| 3 |" in again and "| 5 |" in again
    assert len(recorded(tmp_path / "results")) == len(results)


# -- each stage apart --


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(
        sys, "argv", ["benchmarks.gpu", "--device", "cpu", "--results", str(tmp_path)]
    )
    return tmp_path


def fails(_: Run) -> bool:
    raise RuntimeError("a kernel faulted")


def test_a_stage_that_dies_or_hangs_is_recorded(
    interpreted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"check": "pass", "decode": "import os; os.abort()", "loads": "while True: pass"}
    monkeypatch.setattr(gpu, "_command", lambda stage, *_: [sys.executable, "-c", codes[stage]])
    monkeypatch.setattr(gpu, "_LATE_SECONDS", 0.0)
    args = gpu._arguments()
    assert gpu._apart("check", args, 60) == 0
    assert gpu._apart("decode", args, 60) == gpu._apart("loads", args, 0.1) == 1
    assert [(found["stage"], found["broke"]) for found in recorded(interpreted)] == [
        ("decode", "its process died: status -6"),
        ("loads", "ended: out of time"),
    ]


def test_an_error_in_a_stage_is_recorded_and_counts_for_nothing_later(
    interpreted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.argv += ["--stages", "check", "--here"]
    monkeypatch.setitem(gpu._STAGES, "check", (fails, 1))
    assert gpu.main() == 1
    (found,) = recorded(interpreted)
    assert found["broke"] == "RuntimeError: a kernel faulted"
    assert Run(gpu._arguments()).recorded("check") == []


def test_weights_whose_check_fails_are_not_measured(
    interpreted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fp8_is_wrong(tasks: Any, *_: object) -> list[tuple[Any, Findings]]:
        return [
            (task, Findings(1, failures=["down is wrong"] if task.weights == "fp8" else []))
            for task in tasks
        ]

    monkeypatch.setattr(stages, "_check_apart", fp8_is_wrong)
    run = Run(gpu._arguments())
    assert not stages.check(run)
    assert stages._sound_weights(run) == ["16bit"]
    assert "left out: fp8" in capsys.readouterr().out
    monkeypatch.setattr(stages, "_check_apart", lambda tasks, *_: [(t, None) for t in tasks])
    assert stages.check(run)  # what gave no answer has not failed, and is left for another call
    (_, later) = recorded(interpreted)
    assert {name.split(", ")[-1] for name in later["unanswered"]} == {"fp8 weights"}
    assert stages._sound_weights(run) == ["16bit"]


def test_an_interpreted_run_keeps_away_from_the_real_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--device", "cpu"])
    args = gpu._arguments()
    assert args.smoke
    assert not args.results.is_relative_to(ROOT) and not args.tables.is_relative_to(ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0 and "nothing measured" in capsys.readouterr().out
