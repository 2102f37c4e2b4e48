"""Processes that a test starts: on a free port, and gone when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.progress import PATIENCE_SECONDS

__all__ = ["ended_on_exit", "free_port"]


def free_port() -> int:
    """Return a port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ended_on_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a session on exit: its leader, or if that does not end by itself, all of it."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
