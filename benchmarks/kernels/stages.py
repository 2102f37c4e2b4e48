"""The stages of kernels/run.py, over the parts that do the work: check, tune and measure.

Each writes its own lines to the results file as it goes and reports what it left out; see
kernels/run.py for what each is for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.kernels.baselines import Baseline, baselines
from benchmarks.kernels.cases import DTYPES, RELEASED, SMOKE, Batch, Case, Slabs, rotation
from benchmarks.kernels.checks import Findings, check_batch, check_replay
from benchmarks.kernels.corners import Corner, corners
from benchmarks.kernels.measure import measure_case
from benchmarks.kernels.report import print_report
from benchmarks.kernels.timing import Deadline, Machine, machine_rates
from benchmarks.kernels.trials import Sandbox
from benchmarks.kernels.tuner import keys, sources_digest, tune
from emo_kernels.tuning import Config, Table, load_table, table_path

__all__ = ["Run"]

LAYERS = 4  # slabs in rotation: a pool of 8 in fp8 is 50 MB per layer, four exceed any L2


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


class Run:
    """One call of this script: its machine, sizes, table and deadline."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = Deadline(args.minutes)
        self.device = torch.device(args.device)
        self.dtype = DTYPES[args.dtype]
        self.geometry = SMOKE if args.smoke else RELEASED
        self.interpreter = os.environ.get("TRITON_INTERPRET") == "1"
        self.digest = sources_digest()
        cuda = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if cuda else (8, 0)
        self.device_name = torch.cuda.get_device_name(self.device) if cuda else "interpreter"
        self._package_table = table_path(capability)
        self.table = (args.tables or self._package_table.parent) / self._package_table.name
        self._slabs: dict[str, Slabs] = {}
        print(f"{self.device_name}, kernels {self.digest}; {args.results}, {self.table}")

    def slabs(self, weights: str) -> Slabs:
        """Return the weights of the rotation, made at first use."""
        if "16bit" not in self._slabs:
            layers = 2 if self.args.smoke else LAYERS
            self._slabs["16bit"] = Slabs.random(self.geometry, layers, self.dtype, self.device)
        if weights not in self._slabs:
            self._slabs[weights] = self._slabs["16bit"].in_fp8()
        return self._slabs[weights]

    def config(self, batch: Batch) -> Config:
        """Return the table's tiles for a batch."""
        slots = batch.w13.shape[0] if self.args.lookup == "slab" else batch.slots
        weights = "fp8" if batch.scales else "16bit"
        return self.tiles().nearest(batch.x_TD.shape[0], slots, weights).config

    def tiles(self) -> Table:
        """Return the current table: the package's until one is written elsewhere."""
        return load_table(self.table if self.table.exists() else self._package_table)

    def record(self, result: dict[str, Any]) -> Path:
        """Append a stage's result to the results file."""
        marks = {"kernels": self.digest, "on": self.device_name, "interpreter": self.interpreter}
        return append_result("kernels", vars(self.args), {**result, **marks}, self.args.results)

    def check(self) -> bool:
        """Compare kernels and twins at every corner; return whether all agreed."""
        started, findings = time.monotonic(), Findings()
        tasks = list(self._checks())
        found = _check_apart(tasks, self.args.workers, self.deadline)
        for one in steps(found, "check", total=len(tasks)):
            findings.merge(one)
        seconds = round(time.monotonic() - started, 1)
        print(f"\ncheck: {findings.checked} comparisons in {seconds} s, worst relative errors:")
        print("  " + ", ".join(f"{name} {e:.2g}" for name, e in sorted(findings.worst.items())))
        for failure in findings.failures:
            print(f"  FAILED {failure}")
        if self.device.type != "cuda":
            print("  not checked: CUDA graphs, which this device does not have")
        self.record(
            {
                "stage": "check",
                "checked": findings.checked,
                "worst": findings.worst,
                "failures": findings.failures,
                "seconds": seconds,
            }
        )
        return not findings.failures

    def _checks(self) -> Iterator[_Check]:
        cuda = self.device.type == "cuda"
        # The interpreter's bf16 products are wrong (Triton 3.9): there, fp16 and fp32.
        first, second = ("bf16", "fp16") if cuda else ("fp16", "fp32")
        plain, count = ((1, 3, 64, 257, 4096), 37) if cuda else ((1, 8), 5)
        for seed, corner in enumerate(corners(self.geometry, plain, count)):
            kinds = [(first, "16bit", False)]
            if corner.tokens > count:
                kinds += [(first, "fp8", False), (second, "16bit", False)]
            if cuda and corner.tokens and not corner.nan:
                kinds += [(first, "16bit", True)]
            for dtype, weights, replay in kinds:
                tokens = max(1, corner.tokens)
                config = self.tiles().nearest(tokens, corner.pool_size, weights).config
                yield _Check(corner, dtype, weights, config, str(self.device), seed, replay)

    def tune(self) -> None:
        """Tune keys until the share of this stage is used up."""
        args = self.args
        wanted = keys(args.tokens, sorted({size for _, size in args.pools}))
        wanted = [key for key in wanted if key.weights in args.weights]
        if args.smoke:
            wanted = [key for key in wanted if key.tokens == min(args.tokens)][:2]
        deadline = self.deadline.share(0.55 if "measure" in args.stages else 0.95)
        command = f"torch {torch.__version__}, kernels/run.py --stages tune"
        print(f"\ntune: {len(wanted)} keys, {deadline.seconds_left:.0f} s")
        if not self.table.exists():
            self.table.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._package_table, self.table)
        with Sandbox(args.workers, self.geometry, args.dtype, self.device) as sandbox:
            tuned = tune(
                wanted,
                self.table,
                self.geometry,
                {weights: self.slabs(weights) for weights in args.weights},
                sandbox,
                self.device,
                self.dtype,
                deadline,
                f"{self.device_name}, {command}, kernels {self.digest}",
                self.record,
                again=args.again,
                limit=2 if args.smoke else None,
            )
        load_table.cache_clear()
        print(f"tuned {len(tuned)} keys, {self.table}")

    def measure(self) -> None:
        """Measure every case that is not in the results yet, until the time is up."""
        machine = machine_rates(self.device)
        rates = machine.as_row()
        print(f"\nmeasure: copy {rates['copy_tb_per_s']} TB/s (read + written),", end=" ")
        print(f"dense {rates['dense_tflop_per_s']} TFLOP/s")
        usable, notes = self._baselines()
        known = {} if self.args.again else self._known()
        groups = [
            [Case(tokens, *pool, weights) for tokens in self.args.tokens]
            for weights in self.args.weights
            for pool in self.args.pools
        ]
        groups = [
            [c for c in group if (c.tokens, c.pool, c.weights) not in known] for group in groups
        ]
        todo, rows, problems = sum(map(len, groups)), list(known.values()), []
        for group in steps(groups, "groups of shapes"):
            fresh: list[dict[str, Any]] = []
            for case in steps(group, "shapes"):
                if self.deadline.seconds_left < 5:
                    break
                try:
                    fresh.append(self._measure(case, usable, machine, todo))
                except Exception as problem:  # as a line of the report: the rest still counts
                    problems.append(f"{case}: {type(problem).__name__}: {problem}"[:300])
                todo -= 1
            if fresh:
                rows += fresh
                found = {"machine": rates, "baselines": notes, "rows": fresh}
                self.record({"stage": "measure", **found})
        print_report(rows, judged=not self.interpreter)
        for line in problems:
            print(f"FAILED {line}")
        if todo:
            print(f"\n{todo} shapes are left for another run: out of time")

    def _measure(
        self, case: Case, usable: list[Baseline], machine: Machine, todo: int
    ) -> dict[str, Any]:
        # A case takes about four times `seconds`, and as long again to set up.
        seconds = min(0.15, max(0.02, self.deadline.seconds_left / (8 * todo)))
        return measure_case(
            case,
            self.geometry,
            self.slabs(case.weights),
            self.config,
            usable if case.weights == "16bit" else [],
            machine,
            self.device,
            self.dtype,
            seconds,
        )

    def _baselines(self) -> tuple[list[Baseline], dict[str, str]]:
        """Return the baselines that work here and the notes on all, which are printed."""
        probe = Case(min(32, max(self.args.tokens)), *self.args.pools[0], "16bit")
        slabs = self.slabs("16bit")
        batch = next(rotation(probe, self.geometry, slabs, 1, self.device, self.dtype))
        usable, notes = baselines(batch)
        for name, note in notes.items():
            print(f"  {name}: {note}")
        return usable, notes

    def _known(self) -> dict[tuple[int, str, str], dict[str, Any]]:
        """Return the rows that an earlier run recorded here, with these kernels and tiles."""
        path = self.args.results / "kernels.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        table, found = self.tiles(), {}
        for result in (json.loads(line)["result"] for line in lines):
            mine = (result["on"], result["kernels"]) == (self.device_name, self.digest)
            for row in result["rows"] if mine and result["stage"] == "measure" else ():
                place = (row["tokens"], row["slots"], row["weights"])
                if asdict(table.nearest(*place).config) == row["config"]:
                    found[row["tokens"], row["pool"], row["weights"]] = row
        return found


def _check_apart(tasks: list[_Check], workers: int, deadline: Deadline) -> Iterator[Findings]:
    """Check in worker processes, or in this process if there are none.

    That way compilations run in parallel, and a fault or a hang is a failure, not the end.
    """
    if not workers:
        yield from map(_check, tasks)
        return
    executor = ProcessPoolExecutor(min(8, workers), get_context("spawn"))
    futures = [executor.submit(_check, task) for task in tasks]
    for task, future in zip(tasks, futures, strict=True):
        try:
            yield future.result(timeout=max(1.0, deadline.seconds_left))
        except (BrokenExecutor, TimeoutError) as problem:
            yield Findings(failures=[f"{task.name}: {type(problem).__name__}: no answer"])
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
