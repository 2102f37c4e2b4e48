"""How much of a core a load may take while the model computes.

A load's thread is felt by running requests in two ways. On a core that the model's threads also
use, each millisecond of its work makes a step a millisecond longer, whatever the number of cores:
the other threads wait for the one that was held up. On a core of its own it is felt far less: by
the engine's other processes, which use that core too, and by the interpreter's lock.

So the thread's work is counted in time on a core, not in bytes, and it may take a share of the time
that passes. The share depends on where it runs, never on the size of a load or of the model. Its
turns are short against the model's steps, so each step meets about the same share of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pacer", "Steps"]

_Clock = Callable[[], float]

_SHARE_ASIDE = 0.6  # a load takes 1 / 0.6 of its idle time, which leaves some for its publication
_SHARE_AMONG = 1 / 6  # a step takes 1 / (1 - 1 / 6) = 1.2 of its time, and up to a turn more
_TURNS_PER_STEP = 16
_SHORTEST_TURN_SECONDS = 2.5e-4  # a sleep overshoots by 60 us
_LONGEST_TURN_SECONDS = 4e-3  # a long prefill says nothing about the next step
_BETWEEN_STEPS_SECONDS = 0.1  # more than sampling and scheduling take, which no model is inside of


class Steps:
    """When the model computes: told by its thread, asked by a load's."""

    def __init__(self, clock: _Clock = time.monotonic) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._began: float | None = None
        self._ended: float | None = None

    def begin(self) -> None:
        """Take note that a step begins."""
        self._began = self._clock()

    def end(self) -> None:
        """Take note that the step has ended; `seconds` is how long it took."""
        assert self._began is not None
        self._ended = self._clock()
        self.seconds = self._ended - self._began
        self._began = None

    @property
    def are_running(self) -> bool:
        """Return whether a step is under way, or the last one so recent that more may follow."""
        if self._began is not None:
            return True
        ended = self._ended
        return ended is not None and self._clock() - ended < _BETWEEN_STEPS_SECONDS


class Pacer:
    """Keep the calling thread to its share of a core while steps run; at idle it never rests.

    Work is in seconds of `work_clock`, the thread's time on a core: waiting for the disk takes
    nothing from others. Rest is in seconds of `clock`.
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
        share = _SHARE_ASIDE if is_aside else _SHARE_AMONG
        self._rest_per_work = (1 - share) / share
        self._owed = 0.0
        self._counted = self._work_clock()

    def pause(self) -> None:
        """Rest if it is time to; between two pieces of work."""
        now = self._work_clock()
        worked, self._counted = now - self._counted, now
        if not self._steps.are_running:
            self._owed = 0.0
            return
        turn = self._rest_per_work * self._turn_seconds
        self._owed += self._rest_per_work * worked
        if self._owed < turn:
            return
        start = self._clock()
        self._sleep(self._owed)
        # A sleep lasts too long rather than too short; what is too much counts for the next.
        self._owed = max(-turn, self._owed - (self._clock() - start))

    @property
    def _turn_seconds(self) -> float:
        wanted = self._steps.seconds / _TURNS_PER_STEP
        return min(_LONGEST_TURN_SECONDS, max(_SHORTEST_TURN_SECONDS, wanted))
