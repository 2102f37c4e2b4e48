"""The life of a server, with engine and parts replaced: what is closed, when, and what is told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emo_serve.config import ServeSettings
from emo_serve.errors import ConfigError, EngineDead
from emo_serve.server import life as life_module
from emo_serve.server import serve
from emo_serve.server.shutdown import stop_signals
from emo_serve.server.vllm_adapter.request_log import RequestLog, RequestRecord


class Life:
    """Note what happens to the parts of one server, in order."""

    def __init__(self, tmp_path: Path) -> None:
        self.events: list[str] = []
        self.log = tmp_path / "requests.jsonl"
        args = SimpleNamespace(uvicorn_log_level="info", uds=None)
        self.launch: Any = SimpleNamespace(
            args=args,
            settings=ServeSettings(request_log=self.log),
            plan=SimpleNamespace(has_long_steps=False),
        )
        self.request_log: Any = None

    def close(self) -> None:
        self.events.append("socket closed")

    def stop(self) -> None:
        self.events.append("engine stopped")


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    life = Life(tmp_path)
    monkeypatch.setattr(serve, "prepare", lambda *_: life.launch)
    monkeypatch.setattr(serve, "bind_socket", lambda _: life)
    monkeypatch.setattr(life_module, "start_engine", lambda _, on_every_core: life)
    monkeypatch.setattr(life_module, "stop_engine", lambda engine: engine.stop())
    before = {number: signal.getsignal(number) for number in stop_signals()}
    yield life
    for number, handler in before.items():
        signal.signal(number, handler)


def run() -> int:
    return serve.run([], lambda text: None, None, is_quiet=False)  # type: ignore[arg-type]


def test_the_request_log_outlives_requests_that_end_with_the_event_loop(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: set[asyncio.Task[None]] = set()

    async def build(launch: Any, engine: Any, request_log: RequestLog, *_: Any) -> None:
        async def request() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                request_log.append(RequestRecord(0.0, "math", 0.0, 0.0, True, 0, 0, "aborted"))

        running.add(asyncio.create_task(request()))
        await asyncio.sleep(0)

    async def answer(*_: object) -> int:
        return 0

    monkeypatch.setattr(life_module, "build_server", build)
    monkeypatch.setattr(serve, "_answer", answer)
    assert run() == 0
    assert life.events == ["engine stopped", "socket closed"]
    assert '"outcome": "aborted"' in life.log.read_text()


@pytest.mark.parametrize("error", [EngineDead("it died"), ConfigError("two pools of a name")])
def test_what_fails_after_the_engine_started_stops_it(
    life: Life, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(life_module, "build_server", fail)
    with pytest.raises(type(error), match=str(error)):
        run()
    assert life.events == ["engine stopped", "socket closed"]


def test_the_unix_socket_is_removed_at_the_end(
    life: Life, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def answer(*_: object) -> int:
        return 0

    async def build(*_: object) -> None: ...

    monkeypatch.setattr(life_module, "build_server", build)
    monkeypatch.setattr(serve, "_answer", answer)
    life.launch.args.uds = str(tmp_path / "socket")
    (tmp_path / "socket").touch()
    assert run() == 0
    assert not (tmp_path / "socket").exists()


def test_an_engine_that_does_not_start_says_where_to_look(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, *, on_every_core: bool) -> None:
        raise EngineDead("the engine did not start")

    monkeypatch.setattr(life_module, "start_engine", fail)
    with pytest.raises(EngineDead, match=r"the first ERROR above.*--kv-cache-memory-bytes"):
        run()
    assert life.events == ["socket closed"]


def test_a_quiet_start_that_fails_tells_the_cause_in_one_line() -> None:
    for cause, text in (("ValueError: no memory", ": ValueError: no memory"), (None, ", and pr")):
        output: Any = SimpleNamespace(cause=lambda cause=cause: cause)
        error = life_module.explained(EngineDead("the engine did not start"), output)
        assert str(error).startswith(f"the engine did not start{text}")
        assert "--log-level info shows all its output" in str(error)
