"""A server process to measure: started on a free port, suspended, stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

import httpx
import psutil

from benchmarks.harness.progress import waiting

__all__ = ["ServerProcess", "free_port"]

_START_TIMEOUT_SECONDS = 900


class ServerProcess:
    """Run a command with `--host` and `--port` until exit; inside the `with` block `url` answers.

    What it prints goes to `output` and its errors to `errors`, files, or nowhere. `variables` are
    added to its environment. Without `port` it gets a free one.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: IO[bytes] | None = None,
        variables: Mapping[str, str] | None = None,
        *,
        errors: IO[bytes] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._start = time.perf_counter()
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            self._command,
            stdout=output or subprocess.DEVNULL,
            stderr=errors or subprocess.DEVNULL,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **(variables or {})},
        )

    def __enter__(self) -> ServerProcess:
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        with waiting("starting a server") as show:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise SystemExit(f"{self._command} ended with status {self.process.returncode}")
                if self.is_up():
                    self.start_seconds = time.perf_counter() - self._start
                    return self
                time.sleep(0.5)
                show()
        self.__exit__()
        raise SystemExit(f"{self._command} did not start in {_START_TIMEOUT_SECONDS} s")

    def is_up(self) -> bool:
        """Ask `/health`."""
        try:
            return httpx.get(f"{self.url}/health").is_success
        except httpx.HTTPError:
            return False

    def pause(self) -> None:
        """Suspend every process of this server; workers are not in its group."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        """Let the server run again."""
        for process in self.processes():
            process.resume()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the server run inside the block only."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def resident_bytes(self) -> int:
        """Return the memory that all its processes hold now; shared pages count in each."""
        return sum(process.memory_info().rss for process in self.processes())

    def own_bytes(self) -> int:
        """Return the memory that ends with the server: pages of files that others read are shared.

        The proportional set size of all its processes.
        """
        return sum(process.memory_full_info().pss for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and those it started; none once it has ended."""
        if self.process.poll() is not None:
            return []
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def __exit__(self, *_: object) -> None:
        self.resume()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for process in reversed(self.processes()):
                process.kill()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
