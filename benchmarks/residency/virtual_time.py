"""Run an asyncio program in virtual time: hours of waiting take as long as the work in them.

The event loop's clock starts at 0.0 and stands still while anything is ready to run. When nothing
is, it jumps to the next timer instead of sleeping until then. A program that waits for something
that no timer and no task of its own will bring is stuck forever: DeadlockError. Threads, sockets
and child processes live in real time and do not belong here.

    result = run(program())
    asyncio.get_running_loop().time()  # virtual seconds; pass it wherever a clock is wanted
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["DeadlockError", "run"]

T = TypeVar("T")


class DeadlockError(RuntimeError):
    """Nothing is ready and no timer is set: the program would wait forever."""


def run(program: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time and return its result."""
    with asyncio.Runner(loop_factory=_VirtualTimeLoop) as runner:
        return runner.run(program)


class _JumpingSelector(selectors.DefaultSelector):
    """Poll, and treat the time that the loop wanted to sleep as passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise DeadlockError(f"at {self.now:.3f} s nothing is ready and no timer is set")
        self.now += timeout
        return events


class _VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock only its selector moves."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now
