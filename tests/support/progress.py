"""Waiting for other processes for as long as they get on, however long a busy machine takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

__all__ = ["PATIENCE_SECONDS", "START_SECONDS", "Activity", "wait_for"]

PATIENCE_SECONDS = 600.0
"""For one answer of a server; only a hang takes that long."""

START_SECONDS = 1800.0
"""For a start that gets on. One that does not is given up after QUIET_SECONDS."""

QUIET_SECONDS = 120.0
LEAST_CPU_SECONDS = 2.0  # in that time; processes that only poll for a message use less


class Activity:
    """What a process does: CPU time that it and its descendants use, and bytes it writes."""

    def __init__(self, pid: int, outputs: Sequence[Path]) -> None:
        self._pid = pid
        self._outputs = outputs
        self._cpu_seconds: dict[int, float] = {}
        self._num_bytes = 0

    def has_moved(self) -> bool:
        """Tell whether anything was written, or CPU time used, since this last was true."""
        now = self._measure()
        used = sum(seconds - self._cpu_seconds.get(pid, 0.0) for pid, seconds in now.items())
        num_bytes = sum(path.stat().st_size for path in self._outputs)
        if used < LEAST_CPU_SECONDS and num_bytes == self._num_bytes:
            return False
        self._cpu_seconds, self._num_bytes = now, num_bytes
        return True

    def last_words(self) -> str:
        """Return the end of what the process has written."""
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in self._outputs)

    def _measure(self) -> dict[int, float]:
        found = {}
        try:
            process = psutil.Process(self._pid)
            for each in (process, *process.children(recursive=True)):
                times = each.cpu_times()
                found[each.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            pass  # one has ended meanwhile; the next look counts the others
        return found


def wait_for(
    claim: Callable[[], bool],
    activity: Activity | None = None,
    most_seconds: float = PATIENCE_SECONDS,
) -> None:
    """Wait until the claim holds; fail if `activity` stops for QUIET_SECONDS before it does.

    `most_seconds` bounds what never holds in spite of all activity, so it is far above what any
    machine needs.
    """
    start = looked = moved = time.monotonic()
    while not claim():
        now = time.monotonic()
        if activity is not None and now - looked > 1.0:
            looked = now
            if activity.has_moved():
                moved = now
            assert now - moved < QUIET_SECONDS, (
                f"nothing has moved for {QUIET_SECONDS:.0f} s: {activity.last_words()}"
            )
        if now - start > most_seconds:
            said = "" if activity is None else f": {activity.last_words()}"
            raise AssertionError(f"not within {most_seconds:.0f} s{said}")
        time.sleep(0.01)  # another process; nothing here can be awaited
