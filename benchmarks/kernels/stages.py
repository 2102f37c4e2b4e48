"""Stages of `python -m benchmarks.gpu`, over the parts that do the work: check, tune, measure.

Each writes into the results file as it goes, leaves out what stands there from an earlier call with
the same device, torch and kernels, and reports what was left for another. It returns whether all
was well.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from typing import Any

import torch

from benchmarks.gpu.run import Run
from benchmarks.harness.progress import steps
from benchmarks.kernels.baselines import Baseline, baselines
from benchmarks.kernels.cases import DTYPES, RELEASED, SMOKE, Batch, Case, Geometry, Slabs, rotation
from benchmarks.kernels.checks import Findings, check_batch, check_replay
from benchmarks.kernels.corners import Corner, corners
from benchmarks.kernels.measure import measure_case
from benchmarks.kernels.report import print_report
from benchmarks.kernels.timing import Deadline, Machine, machine_rates
from benchmarks.kernels.trials import Sandbox
from benchmarks.kernels.tuner import keys
from benchmarks.kernels.tuner import tune as tune_keys
from emo_kernels.tuning import Config

__all__ = ["check", "measure", "tune"]

_LAYERS = 4  # slabs in rotation: a pool of 8 in fp8 is 50 MB per layer, four exceed any L2
_CHECKERS = 8  # a check holds a slab of 128 experts and copies of it


# -- check --


@dataclass(frozen=True)
class _Check:
    """One corner to check, as it travels to the process that does it."""

    corner: Corner
    dtype: str
    weights: str
    config: Config
    device: str
    seed: int
    replay: bool = False

    @property
    def name(self) -> str:
        """Return how a failure names it."""
        replayed = ", in a CUDA graph" if self.replay else ""
        return f"{self.corner.name}, {self.dtype}, {self.weights} weights{replayed}"


def check(run: Run) -> bool:
    """Compare kernels and twins at every corner; return whether all agreed."""
    started, findings = time.monotonic(), Findings()
    earlier = {name for found in run.done("check") for name in found["passed"]}
    tasks = [task for task in _checks(run) if task.name not in earlier]
    if not tasks:
        print(f"all {len(earlier)} checks passed in earlier calls")
        return True
    passed, failed, unanswered = [], [], []
    found = _check_apart(tasks, min(_CHECKERS, run.args.workers), run.deadline)
    for task, one in steps(found, "check", total=len(tasks)):
        if one is None:
            unanswered.append(task.name)
            continue
        findings.merge(one)
        (failed if one.failures else passed).append(task)
    seconds = round(time.monotonic() - started, 1)
    print(f"{findings.checked} comparisons in {seconds} s, worst relative errors:")
    print("  " + ", ".join(f"{name} {e:.2g}" for name, e in sorted(findings.worst.items())))
    for failure in findings.failures:
        print(f"  FAILED {failure}")
    if unanswered:
        print(f"  {len(unanswered)} left for another call, out of time: {'; '.join(unanswered)}")
    if not run.is_cuda:
        print("  not checked: CUDA graphs, which this device does not have")
    run.record(
        {
            "stage": "check",
            "checked": findings.checked,
            "worst": findings.worst,
            "failures": findings.failures,
            "failed": {task.name: task.weights for task in failed if task.dtype == _dtype(run)},
            "passed": [task.name for task in passed],
            "unanswered": unanswered,
            "seconds": seconds,
        }
    )
    return not findings.failures


def _dtype(run: Run) -> str:
    """Return the dtype of tokens: the interpreter's bf16 products are wrong (Triton 3.9)."""
    return "bf16" if run.is_cuda else "fp16"


def _geometry(run: Run) -> Geometry:
    return SMOKE if run.args.smoke else RELEASED


def _checks(run: Run) -> list[_Check]:
    """Return all checks, those of the dtype that is measured first."""
    first, second = _dtype(run), "fp16" if run.is_cuda else "fp32"
    plain, count = ((1, 8), 5) if run.args.smoke else ((1, 3, 64, 257, 4096), 37)
    table, found = run.tiles(), list[_Check]()
    for seed, corner in enumerate(corners(_geometry(run), plain, count)):
        kinds = [(first, "16bit", False)]
        if corner.tokens > count:
            kinds += [(first, "fp8", False), (second, "16bit", False)]
        if run.is_cuda and corner.tokens and not corner.nan:
            kinds += [(first, "16bit", True)]
        for dtype, weights, replay in kinds:
            config = table.nearest(max(1, corner.tokens), corner.pool_size, weights).config
            found.append(_Check(corner, dtype, weights, config, str(run.device), seed, replay))
    return sorted(found, key=lambda task: (task.dtype != first, task.replay))


def _check_apart(
    tasks: Sequence[_Check], workers: int, deadline: Deadline
) -> Iterator[tuple[_Check, Findings | None]]:
    """Check in worker processes, so that compilations run in parallel; in this one without any.

    A fault takes its worker's context with it, or all workers. So what met one is checked once
    more in a process of its own. What gives no answer in time is yielded with None.
    """
    if not workers:
        for task in tasks:
            yield task, _check(task) if deadline.seconds_left > 0 else None
        return
    again = []
    for task, found in _in_pool(tasks, workers, None, deadline):
        if found is not None and any(word in str(found.failures) for word in _FAULTS):
            again.append(task)
        else:
            yield task, found
    yield from _in_pool(again, workers, 1, deadline)


_FAULTS = ("CUDA", BrokenExecutor.__name__, "BrokenProcessPool")


def _in_pool(
    tasks: Sequence[_Check], workers: int, most_per_worker: int | None, deadline: Deadline
) -> Iterator[tuple[_Check, Findings | None]]:
    executor = ProcessPoolExecutor(
        workers, get_context("spawn"), max_tasks_per_child=most_per_worker
    )
    futures = [executor.submit(_check, task) for task in tasks]
    for task, future in zip(tasks, futures, strict=True):
        try:
            yield task, future.result(timeout=max(0.1, deadline.seconds_left))
        except TimeoutError:
            yield task, None
        except BrokenExecutor as problem:
            yield task, Findings(failures=[f"{task.name}: {type(problem).__name__}"])
    for process in active_children():  # one that hangs would never be joined
        process.kill()
    executor.shutdown(wait=False, cancel_futures=True)


def _check(task: _Check) -> Findings:
    """Check one corner; an exception is a failure like any other."""
    device, findings = torch.device(task.device), Findings()
    dtype = DTYPES[task.dtype]
    try:
        if task.replay:
            check_replay(task.corner, dtype, task.config, device, findings)
        else:
            batch = task.corner.batch(dtype, task.weights, device, task.seed)
            check_batch(batch, task.config, task.name, findings)
    except Exception as problem:
        findings.failures.append(f"{task.name}: {type(problem).__name__}: {problem}"[:300])
    return findings


# -- tune --


def tune(run: Run) -> bool:
    """Tune keys until the time is up."""
    args, weights = run.args, _sound_weights(run)
    wanted = [key for key in keys(args.tokens, args.slots) if key.weights in weights]
    if args.smoke:
        wanted = [key for key in wanted if key.tokens == min(args.tokens)]
    if not run.table.exists():
        run.table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.package_table, run.table)
    slabs = _slabs(run, weights)
    with Sandbox(args.workers, _geometry(run), _dtype(run), run.device) as sandbox:
        tuned = tune_keys(
            wanted,
            run.table,
            _geometry(run),
            slabs,
            sandbox,
            run.device,
            DTYPES[_dtype(run)],
            run.deadline,
            f"{run.device_name}, torch {torch.__version__}, benchmarks.gpu, kernels {run.digest}",
            run.record,
            again=args.again,
            limit=2 if args.smoke else None,
        )
    print(f"tuned {len(tuned)} of {len(wanted)} keys, {run.table}")
    return True


def _sound_weights(run: Run) -> list[str]:
    """Return the kinds of weights asked for whose kernels did not fail the check."""
    failed: dict[str, str] = {}
    for found in run.recorded("check"):
        failed |= found["failed"]
        for name in found["passed"]:
            failed.pop(name, None)
    unsound = set(failed.values())
    for kind in unsound:
        print(f"left out: {kind} weights, whose kernels failed the check")
    return [kind for kind in run.args.weights if kind not in unsound]


def _slabs(run: Run, weights: Sequence[str]) -> dict[str, Slabs]:
    """Return the weights of the rotation."""
    layers = 2 if run.args.smoke else _LAYERS
    plain = Slabs.random(_geometry(run), layers, DTYPES[_dtype(run)], run.device)
    return {kind: plain if kind == "16bit" else plain.in_fp8() for kind in weights}


# -- measure --


def measure(run: Run) -> bool:
    """Measure every case that is not in the results yet, until the time is up."""
    machine = machine_rates(run.device)
    rates = machine.as_row()
    print(f"copy {rates['copy_tb_per_s']} TB/s (read + written),", end=" ")
    print(f"dense {rates['dense_tflop_per_s']} TFLOP/s")
    weights, known = _sound_weights(run), _known(run)
    slabs = _slabs(run, weights)
    usable, notes = _baselines(run, slabs["16bit"]) if "16bit" in slabs else ([], {})
    cases = [
        Case(tokens, *pool, kind)
        for kind in weights
        for pool in run.args.pools
        for tokens in run.args.tokens
    ]
    todo = [case for case in cases if (case.tokens, case.pool, case.weights) not in known]
    rows, problems = list(known.values()), list[str]()
    for place, case in enumerate(steps(todo, "shapes")):
        if run.deadline.seconds_left < 5:
            print(f"{len(todo) - place} shapes are left for another call: out of time")
            break
        try:
            row = _measure(run, case, slabs[case.weights], usable, machine, len(todo) - place)
        except Exception as problem:  # as a line of the report: the rest still counts
            problems.append(f"{case}: {type(problem).__name__}: {problem}"[:300])
            continue
        rows.append(row)
        run.record({"stage": "measure", "machine": rates, "baselines": notes, "rows": [row]})
    print_report(rows, judged=not run.interpreter)
    for line in problems:
        print(f"FAILED {line}")
    return not problems


def _measure(
    run: Run, case: Case, slabs: Slabs, usable: list[Baseline], machine: Machine, left: int
) -> dict[str, Any]:
    table = run.tiles()

    def config(batch: Batch) -> Config:
        slots = batch.w13.shape[0] if run.args.lookup == "slab" else batch.slots
        return table.nearest(case.tokens, slots, case.weights).config

    # A case takes about four times `seconds`, and as long again to set up.
    seconds = min(0.15, max(0.02, run.deadline.seconds_left / (8 * left)))
    return measure_case(
        case,
        _geometry(run),
        slabs,
        config,
        usable if case.weights == "16bit" else [],
        machine,
        run.device,
        DTYPES[_dtype(run)],
        seconds,
    )


def _baselines(run: Run, slabs: Slabs) -> tuple[list[Baseline], dict[str, str]]:
    """Return the baselines that work here and the notes on all, which are printed."""
    probe = Case(min(32, max(run.args.tokens)), *run.args.pools[0], "16bit")
    made = rotation(probe, _geometry(run), slabs, 1, run.device, DTYPES[_dtype(run)])
    usable, notes = baselines(next(made))
    for name, note in notes.items():
        print(f"  {name}: {note}")
    return usable, notes


def _known(run: Run) -> dict[tuple[int, str, str], dict[str, Any]]:
    """Return the rows that an earlier call recorded with the tiles of today."""
    table, found = run.tiles(), {}
    for result in run.done("measure"):
        for row in result["rows"]:
            place = (row["tokens"], row["slots"], row["weights"])
            if asdict(table.nearest(*place).config) == row["config"]:
                found[row["tokens"], row["pool"], row["weights"]] = row
    return found
