"""The way out: signals, and a drain that finishes what was let in."""

from __future__ import annotations

import asyncio
import signal
import time

from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.asgi.admission import Admission

__all__ = ["StopSignals", "drain"]


async def drain(admission: Admission, manager: ResidencyManager, timeout_seconds: float) -> bool:
    """Refuse new work and wait for what is under way; False when that took too long.

    HTTP requests first: one of them may take several leases in turn. Then leases, which outlive the
    request of a background response.
    """
    deadline = time.monotonic() + timeout_seconds
    admission.close()
    is_idle = await admission.idle(timeout_seconds)
    manager.start_draining()
    return await manager.drained(max(0.0, deadline - time.monotonic())) and is_idle


class StopSignals:
    """Turn the first SIGTERM or SIGINT into one event, and the second into another."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._note)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
