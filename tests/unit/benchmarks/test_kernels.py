"""The stages for kernels: checks can fail, counts are right, tables are written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import emo_kernels
from benchmarks.kernels import stages as kernel_stages
from benchmarks.kernels import trials as kernel_trials
from benchmarks.kernels.baselines import baselines
from benchmarks.kernels.cases import SMOKE, Batch, Case, Slabs, Work, rotation
from benchmarks.kernels.checks import Findings, check_batch, relative_error
from benchmarks.kernels.corners import corners
from benchmarks.kernels.report import targets
from benchmarks.kernels.timing import Deadline
from benchmarks.kernels.trials import Sandbox, Trial
from benchmarks.kernels.tuner import keys, with_row
from emo_kernels.tuning import Config, Row, Table, Tile

CPU = torch.device("cpu")
TILE = Tile(16, 32, 4, 2)
CONFIG = Config(16, TILE, TILE)
# -- the check stage --


def a_batch(tokens: int = 5, weights: str = "16bit") -> Batch:
    slabs = Slabs.random(SMOKE, 1, torch.float16, CPU)
    slabs = slabs.in_fp8() if weights == "fp8" else slabs
    return next(rotation(Case(tokens, 2, 8, weights), SMOKE, slabs, 1, CPU, torch.float16))


def nudged(out: torch.Tensor) -> torch.Tensor:
    out[0, 0] += 1.0
    return out


def other_slots(routed: emo_kernels.Routed) -> emo_kernels.Routed:
    return replace(routed, slots_TK=routed.slots_TK.flip(1))


def other_rows(schedule: emo_kernels.Schedule) -> emo_kernels.Schedule:
    return replace(schedule, rows_R=schedule.rows_R.flip(0))


@pytest.mark.parametrize(
    ("kernel", "wrong", "stage"),
    [
        ("route", other_slots, "slots"),
        ("dispatch", other_rows, "rows_R"),
        ("gate_up", nudged, "gate_up"),
        ("down", nudged, "down"),
        ("combine", nudged, "combine"),
        ("pooled_moe", nudged, "layer"),
    ],
)
def test_a_wrong_kernel_is_found_and_named(
    kernel: str, wrong: Callable[[Any], Any], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(emo_kernels, kernel)
    monkeypatch.setattr(emo_kernels, kernel, lambda *args: wrong(right(*args)))
    findings = Findings()
    check_batch(a_batch(), CONFIG, "here", findings)
    assert any(failure.startswith(f"here: {stage}: ") for failure in findings.failures)


def test_relative_error_is_the_worst_row_and_minds_zeros_and_nan() -> None:
    twin = torch.tensor([[3.0, 4.0], [0.0, 0.0], [300.0, 400.0]])
    assert relative_error(twin, twin) == 0.0
    assert relative_error(twin + torch.tensor([[0.5], [0.0], [0.0]]), twin) == pytest.approx(
        0.5 * 2**0.5 / 5
    )
    unwritten = twin.clone()
    unwritten[2, 1] = float("nan")
    assert relative_error(unwritten, twin) == float("inf")
    assert relative_error(twin, unwritten) == float("inf")
    not_zero = twin.clone()
    not_zero[1, 0] = 1e-6
    assert relative_error(not_zero, twin) == float("inf")
    assert relative_error(twin.half(), twin) == float("inf")


def test_corners_are_what_they_say() -> None:
    found = {corner.name: corner for corner in corners(SMOKE, (1, 8), 6)}
    made = {
        name: corner.batch(torch.float16, "16bit", CPU, seed=1) for name, corner in found.items()
    }
    assert len(made["no tokens"].x_TD) == 0 and len(made["8 tokens"].x_TD) == 8
    assert (made["padding"].pool_rows_T < 0).any() and (made["padding"].pool_rows_T >= 0).any()
    assert (made["all padding"].pool_rows_T < 0).all()
    assert made["NaN logits"].logits_TE.isnan().any(1).sum() == 1
    assert made["256 pools"].tables.members_PE.shape[0] == 256
    assert made["pool below top-k"].slots < SMOKE.top_k
    hot = emo_kernels.reference.route(
        made["hot expert"].logits_TE,
        made["hot expert"].pool_rows_T,
        made["hot expert"].tables,
        made["hot expert"].router,
    )
    assert len(hot.slots_TK[:, 0].unique()) == 1
    half = made["half the slots"]
    assert half.w13.shape[0] == SMOKE.num_experts // 2
    held = half.tables.members_PE.any(0)
    assert (half.tables.slot_of_expert_E[held] >= 0).all()


def test_what_met_a_fault_is_checked_again_and_a_hang_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One task faults, which fails those after it in its process; one never answers."""
    good, struck, faulty, hung = tasks = ["good", "struck", "faulty", "hung"]
    fault = Findings(failures=["RuntimeError: CUDA error: an illegal memory access"])
    asked: list[tuple[list[str], int | None]] = []

    def in_pool(
        tasks: Sequence[Any], workers: int, most_per_worker: int | None, _: Deadline
    ) -> list[tuple[Any, Findings | None]]:
        asked.append((list(tasks), most_per_worker))
        first = most_per_worker is None
        found = {
            good: Findings(checked=1),
            struck: Findings(failures=[BrokenProcessPool.__name__]) if first else Findings(1),
            faulty: fault,
            hung: None,
        }
        return [(task, found[task]) for task in tasks]

    monkeypatch.setattr(kernel_stages, "_in_pool", in_pool)
    found = dict(kernel_stages._check_apart(tasks, 2, Deadline(1)))  # type: ignore[arg-type]
    assert asked == [(tasks, None), ([struck, faulty], 1)]
    assert found == {good: Findings(1), struck: Findings(1), faulty: fault, hung: None}


# -- counts and targets --


def test_work_counts_the_slots_that_were_hit_and_the_rows_that_were_taken() -> None:
    batch, f16 = a_batch(tokens=3), 2
    slots_TK = torch.tensor([[5, 1, -1, 7], [5, 1, 2, 7], [-1, -1, -1, -1]], dtype=torch.int32)
    work = Work.of(batch, slots_TK)
    d, f, e = SMOKE.model_dim, SMOKE.expert_dim, SMOKE.num_experts
    assert (work.hit, work.rows) == (4, 7)
    assert work.weight_bytes == 4 * 3 * d * f * f16
    tokens_bytes = 3 * (e + d) * f16 + 3 * d * f16
    assert work.bytes == work.weight_bytes + tokens_bytes + 2 * 7 * (f + d) * f16
    assert work.flops == 7 * 3 * 2 * d * f

    fp8 = Work.of(a_batch(tokens=3, weights="fp8"), slots_TK)
    assert fp8.weight_bytes == 4 * (3 * d * f + 4 * (2 * f + d))


def a_row(tokens: int, pool: str, **changes: Any) -> dict[str, Any]:
    row = {
        "tokens": tokens,
        "pool": pool,
        "weights": "16bit",
        "layer": {"median_us": 100.0},
        "bandwidth_share": 0.85,
        "weights_bandwidth_share": 0.8,
        "dense_share": 0.7,
        "route_dispatch_share": 0.05,
        "ratios": {"vllm": 1.3},
    }
    return {**row, **changes}


def verdicts(*rows: dict[str, Any]) -> list[bool | None]:
    return [target.reached for target in targets(rows)]


def test_targets_are_reached_missed_or_not_measured() -> None:
    full = a_row(64, "128", layer={"median_us": 401.0})
    good = [a_row(64, "16"), a_row(1, "32"), a_row(4096, "128"), full]
    assert verdicts() == [None] * 7
    assert verdicts(*good) == [True] * 7
    assert verdicts(*good, a_row(8, "32", bandwidth_share=0.79))[0] is False
    assert verdicts(*good, a_row(8, "64", bandwidth_share=0.1))[0] is True  # not of that target
    assert verdicts(*good, a_row(1, "16", bandwidth_share=0.49))[1] is False
    assert verdicts(*good, a_row(16384, "8", dense_share=0.59))[2] is False
    assert verdicts(*good, a_row(2, "8", ratios={"vllm": 0.94}))[3:5] == [False, True]
    slower = [a_row(t, "8", ratios={"vllm": 1.1}) for t in (2, 4, 8, 16, 32)]
    assert verdicts(*good, *slower)[3:5] == [True, False]
    assert verdicts(good[0], a_row(64, "128", layer={"median_us": 399.0}))[5] is False
    assert verdicts(*good, a_row(256, "8", route_dispatch_share=0.11))[6] is False
    assert verdicts(*good, a_row(512, "8", route_dispatch_share=0.11))[6] is True
    assert verdicts(a_row(1, "16", weights="fp8")) == [None] * 7


def test_a_target_against_vllms_products_alone_says_so() -> None:
    found = targets([a_row(8, "16", ratios={"vllm-products": 1.3, "grouped_mm": 2.0})])
    assert found[3].reached and "vLLM's two products alone" in found[3].name


def test_grouped_mm_gives_the_layer() -> None:
    kept, notes = baselines(a_batch())
    assert [baseline.name for baseline in kept] == ["grouped_mm"], notes
    assert notes["vllm"] == "left out, made for CUDA"


def test_the_roofline_is_drawn_from_a_gpu_and_never_from_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    row = a_row(64, "16", work={"flops": 1e9, "bytes": 2e8})
    measured = {"stage": "measure", "interpreter": False, "on": "NVIDIA H200", "rows": [row]}
    measured["machine"] = {"copy_tb_per_s": 4.0, "dense_tflop_per_s": 800.0}
    tuned = {"stage": "tune", "interpreter": False, "on": "NVIDIA H200"}
    interpreted = {**measured, "interpreter": True, "on": "interpreter"}
    monkeypatch.setattr(plot, "RESULTS", tmp_path)

    def draw(*results: dict[str, Any]) -> dict[str, Any]:
        lines = [json.dumps({"result": result}) for result in results]
        (tmp_path / "gpu.jsonl").write_text("\n".join(lines))
        figures = dict(plot.kernels())
        for figure in figures.values():
            plot.plt.close(figure)
        return figures

    assert draw(interpreted, tuned) == {}
    ((name, figure),) = draw(measured, interpreted, tuned).items()
    assert name == "kernels-NVIDIA-H200"
    _, layer = figure.axes[0].get_lines()
    assert layer.get_xydata().tolist() == [[5.0, 10.0]]  # 1e9 FLOPs, 2e8 bytes, 100 us


# -- tuning --


def test_keys_come_with_the_far_ends_first_and_each_once() -> None:
    found = keys((1, 2, 64, 16384), (8, 16, 128))
    assert len(found) == len(set(found)) == 4 * 3 * 2
    assert {key.tokens for key in found[:4]} == {1, 2, 64, 16384}
    assert {(key.slots, key.weights) for key in found[:4]} == {(16, "16bit")}


def test_a_row_takes_its_place_and_the_first_of_fp8_brings_stand_ins() -> None:
    old = Table(tuple(Row(t, 16, "16bit", CONFIG, "guessed") for t in (1, 4096)))
    other = replace(CONFIG, block_m=32)
    table = with_row(old, Row(1, 16, "16bit", other, "tuned"))
    assert [(row.tokens, row.provenance) for row in table.rows] == [(4096, "guessed"), (1, "tuned")]
    table = with_row(table, Row(1, 16, "fp8", replace(CONFIG, block_m=64), "tuned"))
    assert table.nearest(1, 16, "fp8").config.block_m == 64
    far = table.nearest(16384, 16, "fp8")
    assert (far.config, far.provenance) == (CONFIG, "as 16bit; guessed")


def test_sandbox_survives_a_candidate_that_fails_one_that_dies_and_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = Trial("down", 16, TILE, "16bit")
    bad = Trial("down", 16, replace(TILE, block_k=24), "fp8")  # not a power of two
    later = Trial("gate_up", 16, TILE, "16bit")
    with Sandbox(1, SMOKE, "fp16", CPU) as sandbox:
        found = sandbox.verdicts([bad, good], Deadline(5))
        assert found[good] is None and found[bad] is not None
        sandbox._workers[0].process.kill()
        sandbox._workers[0].process.join()
        assert sandbox.verdicts([later, good], Deadline(5)) == {later: None, good: None}
        pid = sandbox._workers[0].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(kernel_trials, "_HUNG_SECONDS", 0.5)
        slow = replace(later, tile=replace(TILE, block_n=32))
        assert sandbox.verdicts([slow], Deadline(5)) == {slow: "no answer for 0.5 s"}
