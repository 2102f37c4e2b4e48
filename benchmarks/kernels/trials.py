"""Candidates tried where they can do no harm: in worker processes, many at once.

A candidate may fail to compile, need more registers or shared memory than there are, compute
nonsense, fault (which ends the CUDA context of its process) or hang. So each is compiled, run and
compared with the twin in a worker first; one that faults or hangs ends only that worker, which is
replaced. What has passed is in Triton's cache on disk, where the process that times finds it. So
compiling, the long part, uses all cores.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

import emo_kernels
from benchmarks.kernels.cases import DTYPES, Case, Geometry, Slabs, rotation
from benchmarks.kernels.checks import relative_error, tolerance
from benchmarks.kernels.timing import Deadline
from emo_kernels import reference
from emo_kernels.tables import Schedule
from emo_kernels.tuning import Tile

__all__ = ["Bench", "Sandbox", "Trial"]

_TOKENS = 64  # with 16 slots and top-8 a slot has 32 rows: several tiles, and a part of one
_SLOTS = 16
_HUNG_SECONDS = 120.0  # a worker's start and the slowest compilation are well within it


@dataclass(frozen=True)
class Trial:
    """One GEMM with one tile: `gemm` is gate_up or down, `weights` 16bit or fp8."""

    gemm: str
    block_m: int
    tile: Tile
    weights: str


class Bench:
    """A batch to run trials on, with the twin's results for it; each trial is checked here."""

    def __init__(
        self, case: Case, geometry: Geometry, slabs: Slabs, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.batches = list(rotation(case, geometry, slabs, slabs.layers, device, dtype))
        routed = [
            reference.route(b.logits_TE, b.pool_rows_T, b.tables, b.router) for b in self.batches
        ]
        self.weights_TK = [r.weights_TK for r in routed]
        self._slots_TK = [r.slots_TK for r in routed]
        first = self.batches[0]
        plan = self.schedule(0, 16)
        self._rows = int(plan.offsets_S1[-1])
        scales13, scales2 = first.scales or (None, None)
        h_RF = reference.gate_up(first.x_TD, first.w13, plan, first.router.top_k, scales13)
        rows_RD = reference.down(h_RF, first.w2, self.weights_TK[0], plan, scales2)
        self.h_RF = h_RF
        self._expected = {"gate_up": h_RF[: self._rows], "down": self._taken(rows_RD)}

    def schedule(self, call: int, block_m: int) -> Schedule:
        """Return a batch's schedule."""
        slots = self.batches[call].w13.shape[0]
        return reference.dispatch(self._slots_TK[call], slots, block_m)

    def run(self, trial: Trial, call: int, schedule: Schedule) -> Tensor:
        """Run a trial's kernel on a batch; h is the first batch's, whichever it is."""
        batch = self.batches[call]
        scales13, scales2 = batch.scales or (None, None)
        if trial.gemm == "gate_up":
            return emo_kernels.gate_up(
                batch.x_TD, batch.w13, schedule, batch.router.top_k, scales13, trial.tile
            )
        return emo_kernels.down(
            self.h_RF, batch.w2, self.weights_TK[call], schedule, scales2, trial.tile
        )

    def problem(self, trial: Trial) -> str | None:
        """Run a trial and return what is wrong with it, None if nothing is."""
        try:
            out = self.run(trial, 0, self.schedule(0, trial.block_m))
            got = out[: self._rows] if trial.gemm == "gate_up" else self._taken(out)
            error = relative_error(got, self._expected[trial.gemm])
        except Exception as problem:  # Triton's and the driver's errors have no common base
            return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
        return None if error <= tolerance(got.dtype) else f"wrong: relative error {error:.3g}"

    def _taken(self, rows_RD: Tensor) -> Tensor:
        return rows_RD[(self._slots_TK[0] >= 0).flatten()]


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    trial: Trial | None = None
    since: float = 0.0


class Sandbox:
    """Worker processes that try candidates; close it when done. Without workers it tries here."""

    def __init__(self, workers: int, geometry: Geometry, dtype: str, device: torch.device) -> None:
        self._arguments = (geometry, dtype, str(device))
        self._here = _benches(*self._arguments) if workers == 0 else None
        self._workers = [self._start() for _ in range(workers)]
        self._verdicts: dict[Trial, str | None] = {}

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()

    def verdicts(self, trials: Iterable[Trial], deadline: Deadline) -> dict[Trial, str | None]:
        """Try what has not been tried; return each trial's problem, None if it has none.

        Trials cut off by the deadline are missing.
        """
        wanted = list(dict.fromkeys(trials))
        waiting = [trial for trial in reversed(wanted) if trial not in self._verdicts]
        if self._here is not None:
            while waiting and deadline.seconds_left > 0:
                trial = waiting.pop()
                self._verdicts[trial] = self._here[trial.weights].problem(trial)
        else:
            self._feed(waiting, deadline)
        return {trial: self._verdicts[trial] for trial in wanted if trial in self._verdicts}

    def _feed(self, waiting: list[Trial], deadline: Deadline) -> None:
        while deadline.seconds_left > 0:
            for worker in self._workers:
                if not worker.process.is_alive():
                    self._replace(worker, "its process died")
                if worker.trial is None and waiting:
                    worker.trial, worker.since = waiting.pop(), time.monotonic()
                    worker.pipe.send(worker.trial)
            busy = [worker for worker in self._workers if worker.trial is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                if worker.pipe in ready:
                    self._take(worker)
                elif time.monotonic() - worker.since > _HUNG_SECONDS:
                    self._replace(worker, f"no answer for {_HUNG_SECONDS:g} s")
        for worker in self._workers:  # late answers must not be taken for the next trial's
            if worker.trial is not None:
                self._replace(worker, None)

    def _take(self, worker: _Worker) -> None:
        assert worker.trial is not None
        try:
            problem = worker.pipe.recv()
        except EOFError:
            self._replace(worker, "its process died")
            return
        self._verdicts[worker.trial] = problem
        worker.trial = None
        if problem is not None and "CUDA" in problem:  # after a fault its context is gone
            self._replace(worker, None)

    def _replace(self, worker: _Worker, problem: str | None) -> None:
        """Replace a worker by a new process; `problem` is the verdict on what it was trying."""
        if worker.trial is not None and problem is not None:
            self._verdicts[worker.trial] = problem
        worker.process.kill()
        new = self._start()
        worker.process, worker.pipe, worker.trial = new.process, new.pipe, None

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _serve(pipe: Connection, geometry: Geometry, dtype: str, device: str) -> None:
    """Answer each trial with its problem, until the parent is gone."""
    benches = _benches(geometry, dtype, device)
    while True:
        try:
            trial = pipe.recv()
        except EOFError:
            return
        pipe.send(benches[trial.weights].problem(trial))


def _benches(geometry: Geometry, dtype: str, device: str) -> dict[str, Bench]:
    """Return a small bench per kind of weights: few slots, the geometry's own dimensions."""
    where, kind = torch.device(device), DTYPES[dtype]
    experts = min(_SLOTS, geometry.num_experts)
    small = Geometry(
        geometry.model_dim, geometry.expert_dim, experts, geometry.top_k, geometry.num_shared
    )
    tokens = _TOKENS if where.type == "cuda" else 8
    slabs = Slabs.random(small, 1, kind, where)
    return {
        weights: Bench(
            Case(tokens, 1, experts, weights),
            small,
            slabs.in_fp8() if weights == "fp8" else slabs,
            where,
            kind,
        )
        for weights in ("16bit", "fp8")
    }
