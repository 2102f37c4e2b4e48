"""What a server's processes hold, sampled over time, and how fast it grows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

from benchmarks.reliability.server import Server, shared_memory_of
from benchmarks.reliability.summary import second_half, slope

__all__ = ["ProcessSample", "ServerSample", "growth", "take_sample"]


@dataclass(frozen=True)
class ProcessSample:
    """What the processes of one role hold.

    PSS divides shared pages among all processes of the machine that share them, so it falls when
    another program starts; USS has the private pages only.
    """

    rss_bytes: int = 0
    pss_bytes: int = 0
    uss_bytes: int = 0
    descriptors: int = 0
    threads: int = 0


@dataclass(frozen=True)
class ServerSample:
    """All roles of a server at one time; shared memory and files are those of the whole server."""

    seconds: float
    roles: dict[str, ProcessSample]
    shared_memory_bytes: int
    temporary_files: int


def take_sample(server: Server, seconds: float) -> ServerSample:
    """Sample a server; `seconds` is the time of the sample."""
    return ServerSample(
        seconds,
        {role: _sum(processes) for role, processes in server.by_role().items()},
        sum(shared_memory_of(server.processes()).values()),
        len(server.temporary_files()),
    )


def _sum(processes: Sequence[psutil.Process]) -> ProcessSample:
    total = ProcessSample()
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            memory = process.memory_full_info()
            total = ProcessSample(
                total.rss_bytes + memory.rss,
                total.pss_bytes + memory.pss,
                total.uss_bytes + memory.uss,
                total.descriptors + process.num_fds(),
                total.threads + process.num_threads(),
            )
    return total


def growth(samples: Sequence[ServerSample]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, per role and quantity, its first, middle and last value and its growth per hour.

    Growth is the slope of a line fitted to the second half, when the KV cache has been touched.
    """
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for sample in samples:
        whole = {"shared_memory_bytes", "temporary_files"}
        rows = {role: asdict(values) for role, values in sample.roles.items()}
        rows["server"] = {name: getattr(sample, name) for name in sorted(whole)}
        for role, values in rows.items():
            for name, value in values.items():
                points = series.setdefault(role, {}).setdefault(name, [])
                points.append((sample.seconds, value))
    return {
        role: {name: _growth(points) for name, points in quantities.items()}
        for role, quantities in series.items()
    }


def _growth(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    later = second_half(points)
    return {
        "first": points[0][1],
        "middle": later[0][1],
        "last": points[-1][1],
        "per_hour": 3600 * slope(later),
    }
