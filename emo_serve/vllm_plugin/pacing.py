"""How much of a core a load may take while the model computes.

A load's thread is felt by running requests in two ways. On a core that the model's threads also
use, each millisecond of its work makes a step a millisecond longer, whatever the number of cores:
the other threads wait for the one that was held up. On a core of its own it is felt far less: by
the engine's other processes, which use that core too, and by the interpreter's lock. They need both
between two steps, when the model waits for them: a load then stands still.

So the thread's work is counted in time on a core, not in bytes, and it may take a share of the time
that passes. The share depends on where it runs, never on the size of a load or of the model. Its
turns are short against the model's steps, so each step meets about the same share of work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Pacer", "Steps"]

_Clock = Callable[[], float]

_SHARE_ASIDE = 0.6  # a load takes 1 / 0.6 of its idle time, which leaves some for its publication
_SHARE_AMONG = 1 / 6  # a step takes 1 / (1 - 1 / 6) = 1.2 of its time, and up to a turn more
_TURNS_PER_STEP = 16
_SHORTEST_TURN_SECONDS = 2.5e-4  # a sleep overshoots by 60 us
_TURNS_SAVED = 2  # of rest, in which a step is made longer; for the time between two steps
_LONGEST_TURN_SECONDS = 4e-3  # a long prefill says nothing about the next step
_LEAST_BETWEEN_SECONDS = 0.01  # sampling and scheduling may take longer than a small model
_MOST_BETWEEN_SECONDS = 0.1


class Steps:
    """When the model computes: told by its thread, asked by a load's."""

    def __init__(self, clock: _Clock = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._is_inside = threading.Event()
        self._began = self._idle_from = -float("inf")

    def begin(self) -> None:
        """Take note that a step begins."""
        self._began = self._clock()
        self._is_inside.set()

    def end(self) -> None:
        """Take note that the step has ended; `seconds` is how long it took."""
        now = self._clock()
        self.seconds = now - self._began
        between = min(_MOST_BETWEEN_SECONDS, max(_LEAST_BETWEEN_SECONDS, self.seconds))
        self._idle_from = now + between
        self._is_inside.clear()

    def wait_for_next(self) -> bool:
        """Return when a step is under way, or none is to be expected; return whether one is."""
        while not self._is_inside.is_set():
            remaining = self._idle_from - self._clock()
            if remaining <= 0:
                return False
            self._wait(remaining)
        return True

    def _wait(self, seconds: float) -> None:
        self._is_inside.wait(seconds)


class Pacer:
    """Keep the calling thread to its share of a core while steps run; at idle it never rests.

    Work is in seconds of `work_clock`, the thread's time on a core. All other time that passes is
    rest: sleep, but also waiting for the disk, for a core, or for the next step.
    """

    def __init__(
        self,
        steps: Steps,
        work_clock: _Clock = time.thread_time,
        clock: _Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._steps, self._work_clock, self._clock, self._sleep = steps, work_clock, clock, sleep

    def begin(self, *, is_aside: bool) -> None:
        """Begin to count, on the load's thread; `is_aside` if it has a core off the model's."""
        self._share = _SHARE_ASIDE if is_aside else _SHARE_AMONG
        self._count_afresh()

    def _count_afresh(self) -> None:
        self._ahead = 0.0  # how long to rest until the work done is the share of the time passed
        self._worked, self._now = self._work_clock(), self._clock()

    def pause(self) -> None:
        """Rest if it is time to; between two pieces of work."""
        if not self._steps.wait_for_next():
            self._count_afresh()
            return
        worked, now = self._work_clock(), self._clock()
        self._ahead += (worked - self._worked) / self._share - (now - self._now)
        self._worked, self._now = worked, now
        turn_rest = (1 / self._share - 1) * self._turn_seconds
        self._ahead = max(self._ahead, -_TURNS_SAVED * turn_rest)
        if self._ahead >= turn_rest:
            self._sleep(self._ahead)

    @property
    def _turn_seconds(self) -> float:
        wanted = self._steps.seconds / _TURNS_PER_STEP
        return min(_LONGEST_TURN_SECONDS, max(_SHORTEST_TURN_SECONDS, wanted))
