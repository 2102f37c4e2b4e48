"""How long device work takes: medians of many replays, and the two rates a machine can reach.

On CUDA the calls of one rotation (each with other inputs and weights) are captured in one graph,
which is replayed between events, so that neither Python nor launches are in the figure. What cannot
be captured runs eagerly between events and is marked so. On the CPU a clock is read. A rotation
must touch more bytes than the L2 cache holds; the caller sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles

import torch

__all__ = ["Deadline", "Machine", "Timing", "machine_rates", "measure", "quartiles", "repeated"]

Call = Callable[[], object]
_MAX_REPEATS = 400


class Deadline:
    """A time to finish by; one monotonic clock, started at construction."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        """Return the seconds left; below zero once the deadline has passed."""
        return self.end - time.monotonic()

    def share(self, part: float) -> Deadline:
        """Return a nearer deadline, after `part` of the time left."""
        return Deadline(part * max(self.seconds_left, 0.0) / 60)


@dataclass(frozen=True)
class Timing:
    """Microseconds one call takes: median and quartiles over repeats of a rotation of calls.

    `how` is graph (replayed), eager (launched from Python, between events) or clock (CPU).
    """

    median_us: float
    q1_us: float
    q3_us: float
    repeats: int
    calls: int
    how: str

    def as_row(self) -> dict[str, object]:
        """Return what JSON holds of it."""
        row = asdict(self)
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


@dataclass(frozen=True)
class Machine:
    """What the device reached in this run: a copy's bytes (read and written), a dense product."""

    copy_bytes_per_s: float
    dense_flops_per_s: float
    copy: Timing
    dense: Timing

    def as_row(self) -> dict[str, object]:
        """Return what JSON holds of it."""
        return {
            "copy_tb_per_s": round(1e-12 * self.copy_bytes_per_s, 4),
            "dense_tflop_per_s": round(1e-12 * self.dense_flops_per_s, 3),
            "copy": self.copy.as_row(),
            "dense": self.dense.as_row(),
        }


def measure(
    calls: Sequence[Call], device: torch.device, seconds: float = 0.08, min_repeats: int = 12
) -> Timing:
    """Time a rotation of calls: warm up, then repeat for about `seconds`.

    On the CPU, where no figure counts, twice.
    """
    for call in calls:  # compiles what has not been compiled
        call()
    if device.type != "cuda":
        times_ms = _clock_times(lambda: [call() for call in calls], 2)
        return _timing([1e3 * ms / len(calls) for ms in times_ms], len(calls), "clock")
    torch.cuda.synchronize()
    run, how = _captured(calls)
    times_ms = repeated(run, device, seconds, min_repeats, _MAX_REPEATS)
    return _timing([1e3 * ms / len(calls) for ms in times_ms], len(calls), how)


def repeated(run: Call, device: torch.device, seconds: float, least: int, most: int) -> list[float]:
    """Return the milliseconds of each repeat of a call, for about `seconds`; three do not count."""
    times = _event_times if device.type == "cuda" else _clock_times
    per_repeat = max(times(run, 3)[-1], 1e-3)
    return times(run, max(least, min(most, int(1e3 * seconds / per_repeat))))


def quartiles(times: Sequence[float]) -> dict[str, float]:
    """Return the median and what half of the values lie between."""
    q1, median, q3 = quantiles(times, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def _captured(calls: Sequence[Call]) -> tuple[Call, str]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:  # a call that syncs; torch ends the capture itself
        torch.cuda.synchronize()
        return lambda: [call() for call in calls], "eager"
    return graph.replay, "graph"


def _event_times(run: Call, repeats: int) -> list[float]:
    """Return the milliseconds of each of `repeats` runs; the queue is never drained in between."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True)]


def _clock_times(run: Call, repeats: int) -> list[float]:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _timing(times_us: Sequence[float], calls: int, how: str) -> Timing:
    found = quartiles(times_us)
    return Timing(found["median"], found["q1"], found["q3"], len(times_us), calls, how)


def machine_rates(device: torch.device) -> Machine:
    """Measure the device's own copy and its library's dense product, on random data.

    CUDA: 2 GiB copied, 8192 x 8192 x 8192 in bf16. CPU: 32 MiB, 256 x 256 x 256 in fp32, only to
    run this code.
    """
    cuda = device.type == "cuda"
    size, side, dtype = (2**31, 8192, torch.bfloat16) if cuda else (2**25, 256, torch.float32)
    copy, dense = _copy(size, device), _dense(side, dtype, device)
    return Machine(
        copy_bytes_per_s=2 * size / (1e-6 * copy.median_us),
        dense_flops_per_s=2 * side**3 / (1e-6 * dense.median_us),
        copy=copy,
        dense=dense,
    )


def _copy(size: int, device: torch.device) -> Timing:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure([lambda: target.copy_(source)], device, seconds=0.2)


def _dense(side: int, dtype: torch.dtype, device: torch.device) -> Timing:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return measure([lambda: torch.mm(left, right, out=out)], device, seconds=0.3)
