"""A real `emo-serve serve` in its own process, and helpers for tests that talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

START_SECONDS = 300.0


class RunningServer:
    """One server process; `output` and `log` are its stdout and stderr so far."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._directory = directory

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def output(self) -> str:
        return (self._directory / "out").read_text(errors="replace")

    @property
    def log(self) -> str:
        return (self._directory / "err").read_text(errors="replace")

    @property
    def summary(self) -> str:
        """Return the start-up summary."""
        start = self.output.index("emo-serve: ")
        return self.output[start:]

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120
        )

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def start(directory: Path, *arguments: str) -> Iterator[RunningServer]:
    """Start `emo-serve serve` on a free port; always stop it on exit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "emo_serve", "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        yield RunningServer(process, port, directory)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def serve(directory: Path, *arguments: str) -> Iterator[RunningServer]:
    """Start `emo-serve serve` and wait for its summary."""
    with start(directory, *arguments) as server:
        wait_for(lambda: "  try " in server.output or server.has_ended, START_SECONDS)
        assert not server.has_ended, f"{server.output[-4000:]}\n{server.log[-4000:]}"
        yield server


def engines_of(server: RunningServer) -> list[psutil.Process]:
    """Return the processes of the server's engine; none before it has started one."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "EngineCore" in " ".join(child.cmdline())]


@contextmanager
def stopped_engine(server: RunningServer) -> Iterator[None]:
    """Hold the engine still: requests that the front end has handed to it run on and on."""
    (engine,) = engines_of(server)
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


class RawRequest:
    """A completion request over a bare socket, whose reader does what the test says."""

    def __init__(self, server: RunningServer, key: str = "none", **body: Any) -> None:
        text = json.dumps({"stream": True, "max_tokens": 480, "ignore_eos": True, **body}).encode()
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.received = b""
        self.socket.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {key}\r\nConnection: close\r\n".encode()
            + f"Content-Length: {len(text)}\r\n\r\n".encode()
            + text
        )

    def read_events(self, count: int) -> None:
        """Read until that many events of the stream have arrived in all."""
        while self.received.count(b"data:") < count:
            more = self.socket.recv(4096)
            assert more, f"the stream ended: {self.received[-500:]!r}"
            self.received += more

    def read_to_end(self) -> None:
        """Read until the server closes the connection."""
        while more := self.socket.recv(65536):
            self.received += more

    def __enter__(self) -> RawRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def wait_for(claim: Callable[[], bool], seconds: float = 60.0) -> float:
    """Return how long it took for the claim to hold; fail if it takes longer than that."""
    start = time.monotonic()
    while not claim():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.01)  # another process; nothing here can be awaited
    return time.monotonic() - start


def error_of(error: openai.APIStatusError) -> dict[str, Any]:
    """Return the body of an error, checked to have OpenAI's shape."""
    body = json.loads(error.response.content)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == error.status_code
    found: dict[str, Any] = body["error"]
    return found
