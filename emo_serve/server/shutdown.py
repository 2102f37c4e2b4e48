"""Shutting down: signals, and a drain that finishes the requests already admitted."""

from __future__ import annotations

import asyncio
import signal
import time

from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.asgi.admission import Admission

__all__ = ["StopSignals", "drain", "stop_signals"]


async def drain(admission: Admission, manager: ResidencyManager, timeout_seconds: float) -> bool:
    """Refuse new work and wait for running requests; False if `timeout_seconds` was too short.

    Waits for HTTP requests first, because one of them may take several leases in turn. Then for
    leases, which outlive the HTTP request of a background response.
    """
    deadline = time.monotonic() + timeout_seconds
    admission.close()
    is_idle = await admission.idle(timeout_seconds)
    manager.start_draining()
    return await manager.drained(max(0.0, deadline - time.monotonic())) and is_idle


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop the server; SIGHUP only if it is not ignored, as by nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    hangup = () if is_ignored else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hangup)


class StopSignals:
    """Set `first` on the first of `stop_signals`, and `second` on the second."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in stop_signals():
            loop.add_signal_handler(number, self._note)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
