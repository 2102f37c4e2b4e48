"""The server of a scenario: the shipped model with a temporary directory of its own.

Its sockets and other temporary files lie in that directory, so what it leaves there can be counted
on a machine that others use too. Its log is there as well, and is printed if the server does not
start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.harness.servers import ServerProcess

__all__ = [
    "ROLES",
    "Server",
    "client_session",
    "is_alive",
    "role_of",
    "server",
    "shared_memory_of",
]

ROLES = {"engine": "EngineCore", "worker": "Worker"}
"""What the command lines of vLLM's processes contain; the front end is the process started."""

_SHARED_MEMORY = re.compile(r"(/dev/shm/\S+)$", re.MULTILINE)
_LOG = "server.log"


class Server(ServerProcess):
    """`emo-serve serve` on the shipped model; with `socket_path` it listens there (`--uds`)."""

    def __init__(
        self,
        directory: Path,
        *flags: str,
        port: int | None = None,
        socket_path: Path | None = None,
    ) -> None:
        self.directory = directory
        self.socket_path = socket_path
        command = [sys.executable, "-m", "emo_serve", "serve", *flags]
        if socket_path is not None:
            command += ["--uds", str(socket_path)]
        with (directory / _LOG).open("ab") as log:
            variables = {"TMPDIR": str(directory)}
            super().__init__(command, log, variables, errors=log, port=port)

    def __enter__(self) -> Server:
        try:
            super().__enter__()
        except SystemExit:
            print(self.last_words(), file=sys.stderr)
            raise
        return self

    def last_words(self) -> str:
        """Return the end of the server's output."""
        return (self.directory / _LOG).read_text(errors="replace")[-4000:]

    def is_up(self) -> bool:
        """Try to connect: the server listens once it is ready."""
        family = socket.AF_INET if self.socket_path is None else socket.AF_UNIX
        address = ("127.0.0.1", self.port) if self.socket_path is None else str(self.socket_path)
        with socket.socket(family) as probe:
            return probe.connect_ex(address) == 0

    def session(self, seconds: float = 120) -> aiohttp.ClientSession:
        """Return a client with any number of connections and a time limit for each request."""
        return client_session(self.url, self.socket_path, seconds)

    def observer(self) -> aiohttp.ClientSession:
        """Return a client that makes a connection for each request: no idle one can be closing."""
        return client_session(self.url, self.socket_path, seconds=60, keep_open=False)

    def by_role(self) -> dict[str, list[psutil.Process]]:
        """Return the processes of the front end, the engine and the workers."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.processes():
            role = "front end" if process.pid == self.process.pid else role_of(process)
            if role is not None:
                found.setdefault(role, []).append(process)
        return found

    def temporary_files(self) -> list[Path]:
        """Return the server's files and sockets in its temporary directory, without the log."""
        paths = self.directory.rglob("*")
        return [path for path in paths if path.name != _LOG and not path.is_dir()]

    def stop(self, seconds: float = 60) -> tuple[int, float]:
        """Send SIGTERM; return the exit status and how long the end took."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds), time.monotonic() - start


@contextmanager
def server(*flags: str, **options: Any) -> Iterator[Server]:
    """Run a server in a new temporary directory, which is removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="emo-"))  # short: a socket's path has 107 characters
    try:
        with Server(directory, *flags, **options) as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def client_session(
    url: str, socket_path: Path | None, seconds: float, *, keep_open: bool = True
) -> aiohttp.ClientSession:
    """Return a client of the server at a URL or a Unix socket."""
    connector = (
        aiohttp.TCPConnector(limit=0, force_close=not keep_open)
        if socket_path is None
        else aiohttp.UnixConnector(str(socket_path), limit=0, force_close=not keep_open)
    )
    timeout = aiohttp.ClientTimeout(total=seconds)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout)


def role_of(process: psutil.Process) -> str | None:
    """Return a role of ROLES; None for helpers and for a process that has ended."""
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return next((role for role, part in ROLES.items() if f"VLLM::{part}" in command), None)
    return None


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still runs; a zombie does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shared_memory_of(processes: list[psutil.Process]) -> dict[str, int]:
    """Return the files in /dev/shm that processes have mapped, and the bytes they hold."""
    names: set[str] = set()
    for process in processes:
        with suppress(OSError):  # it has ended
            names.update(_SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text()))
    sizes: dict[str, int] = {}
    for name in names:
        with suppress(OSError):  # removed, but still mapped
            sizes[name] = os.stat(name).st_blocks * 512
    return sizes
