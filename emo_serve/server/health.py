"""Whether the server is making progress: the age of the engine's last step, and the loop's lag.

A worker that hangs, or that somebody stopped, keeps its process alive: vLLM notices nothing, and
requests wait forever. So while the engine has work, the time since its last step is measured; past
a deadline the server is not ready. A stopped process is reported at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import psutil  # type: ignore[import-untyped]

__all__ = ["Health", "child_processes", "stopped_among"]

_TICK_SECONDS = 0.1
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class Health:
    """What /ready and the metrics say about progress.

    `is_draining`, `is_dead` (the engine) and `has_work` (requests that the engine has not finished)
    are asked each time. `step_deadline_seconds` should exceed the longest honest step.
    `observe_lag` gets the seconds by which the event loop was late, ten times per second.
    """

    def __init__(
        self,
        *,
        is_draining: Callable[[], bool],
        is_dead: Callable[[], bool],
        has_work: Callable[[], bool],
        step_deadline_seconds: float,
        observe_lag: Callable[[float], None],
        find_stopped: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_draining, self._is_dead, self._has_work = is_draining, is_dead, has_work
        self._step_deadline, self._observe_lag = step_deadline_seconds, observe_lag
        self._find_stopped, self._clock = find_stopped, clock
        self._last_step = clock()

    def note_step(self) -> None:
        """Count a step of the engine: it has sent the results of one."""
        self._last_step = self._clock()

    def step_age_seconds(self) -> float:
        """Return the time since the last step, or since work came to an idle engine; 0 if idle."""
        if not self._has_work():
            self.note_step()
            return 0.0
        return self._clock() - self._last_step

    def why_not_ready(self) -> str | None:
        """Return why new requests should go elsewhere, or None."""
        if self._is_dead():
            return "the engine has died"
        if self._is_draining():
            return "the server is shutting down"
        if (stopped := self._find_stopped()) is not None:
            return f"{stopped} is stopped; continue it (SIGCONT), or restart the server"
        if (age := self.step_age_seconds()) > self._step_deadline:
            return (
                f"the engine has work and has made no step for {age:.0f} s; the limit is"
                f" {self._step_deadline:g} s (--step-deadline); restart the server if this lasts"
            )
        return None

    async def run(self) -> None:
        """Measure until cancelled: the loop's lag, and when work comes to an idle engine."""
        while True:
            start = self._clock()
            await asyncio.sleep(_TICK_SECONDS)
            self._observe_lag(max(0.0, self._clock() - start - _TICK_SECONDS))
            self.step_age_seconds()


def child_processes() -> list[psutil.Process]:
    """Return the processes that this one and its children have started: the engine's.

    Reads all of /proc, so it is asked once, when the engine has started.
    """
    children: list[psutil.Process] = psutil.Process().children(recursive=True)
    return children


def stopped_among(processes: Sequence[psutil.Process]) -> str | None:
    """Return which of the processes a signal or a debugger has stopped; None if there is none."""
    for process in processes:
        try:
            if process.status() in _STOPPED:
                return f"process {process.pid} ({process.name()})"
        except psutil.Error:  # it has ended meanwhile
            continue
    return None
