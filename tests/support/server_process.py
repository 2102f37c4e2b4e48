"""A real `emo-serve serve` in its own process, and helpers for tests that talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from tests.support.processes import ended_on_exit, free_port
from tests.support.progress import PATIENCE_SECONDS, START_SECONDS, Activity, wait_for


class RunningServer:
    """One server process; `output` and `log` are its stdout and stderr so far.

    Clients have the server's key, an operator's if there is one, unless a test names another; the
    key "" stands for none.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        port: int,
        directory: Path,
        arguments: tuple[str, ...],
    ) -> None:
        self.process = process
        self.port = port
        self.arguments = arguments
        self.url = f"http://127.0.0.1:{port}"
        self.activity = Activity(process.pid, [directory / "out", directory / "err"])
        keys = [self.value(flag) for flag in ("--admin-api-key", "--api-key")]
        self.key = next((key for key in keys if key is not None), "")
        self._directory = directory

    def value(self, flag: str) -> str | None:
        """Return the value of a flag the server was started with."""
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return next((value for name, value in pairs if name == flag), None)

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

    def http(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(**self._options(key))

    def async_http(self, key: str | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options(key))

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(**self._openai_options(key))

    def async_client(self, key: str | None = None) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._openai_options(key))

    def _options(self, key: str | None) -> dict[str, Any]:
        """Return an httpx client's arguments."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return {"base_url": self.url, "headers": headers, "timeout": PATIENCE_SECONDS}

    def _openai_options(self, key: str | None) -> dict[str, Any]:
        url = f"{self.url}/v1"
        options = {"base_url": url, "api_key": key or self.key or "none", "max_retries": 0}
        return {**options, "timeout": PATIENCE_SECONDS}

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def start(directory: Path, *arguments: str) -> Iterator[RunningServer]:
    """Start `emo-serve serve` on a free port; always stop it on exit."""
    port = free_port()
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
    with ended_on_exit(process):
        yield RunningServer(process, port, directory, arguments)


@contextmanager
def serve(directory: Path, *arguments: str) -> Iterator[RunningServer]:
    """Start `emo-serve serve` and wait for its summary, as long as the start gets on."""
    with start(directory, *arguments) as server:
        wait_for(
            lambda: "  try " in server.output or server.has_ended, server.activity, START_SECONDS
        )
        assert not server.has_ended, server.activity.last_words()
        yield server


def engines_of(server: RunningServer) -> list[psutil.Process]:
    """Return the processes of the server's engine; none before it has started one."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "EngineCore" in " ".join(words_of(child))]


def words_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty for one that has ended or is a zombie."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


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

    def __init__(self, server: RunningServer, key: str | None = None, **body: Any) -> None:
        key = key or server.key or "none"
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


def error_of(error: openai.APIStatusError) -> dict[str, Any]:
    """Return the body of an error, checked to have OpenAI's shape."""
    body = json.loads(error.response.content)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == error.status_code
    found: dict[str, Any] = body["error"]
    return found
