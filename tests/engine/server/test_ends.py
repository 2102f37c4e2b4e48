"""Ends of servers: a drain, a restart, a dead engine, a killed server, a start given up.

These tests run last, as they end servers that other tests share. What comes after the restart is
told to the server that was started again.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from emo_serve.server.serve import CUT_STATUS
from tests.browser.test_playground import answer_of, choose
from tests.engine.server.conftest import ADMIN, GOLDEN, POOLS, document, hold_only
from tests.engine.server.test_operators import cards_of, text_of
from tests.engine.server.test_requests import running
from tests.support.progress import wait_for
from tests.support.server_process import (
    RawRequest,
    RunningServer,
    engines_of,
    error_of,
    serve,
    start,
    stopped_engine,
)

pytestmark = [pytest.mark.vllm, pytest.mark.server("tight")]

DEADLINE_SECONDS = 5  # for loads, after the restart
CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class End:
    """How a server went that was told to end while it built a pool, and what it left."""

    texts: dict[str, str]
    cards: dict[str, dict[str, Any]]
    build: httpx.Response
    status: int


@pytest.fixture(scope="module")
def end(server: RunningServer) -> End:
    """Define, redefine and remove pools; then send SIGTERM in the middle of a build."""
    body = {"name": "late", "examples": ["abcd" * 40, "efgh" * 20], "experts": 8}
    with ThreadPoolExecutor() as threads, server.http() as http, server.http() as others:
        with server.client() as client:
            texts = {name: text_of(client, name) for name in POOLS}
        http.post("/v1/pools", json=document("poems", "math")).raise_for_status()
        http.post("/v1/pools?replace=true", json=document("math", "law")).raise_for_status()
        http.delete("/v1/pools/law").raise_for_status()
        cards = cards_of(http)
        with stopped_engine(server):
            building = threads.submit(http.post, "/v1/pools", json=body)
            wait_for(lambda: is_under_way(others))
            server.terminate()
            wait_for(lambda: others.get("/ready").status_code == 503)
        build = building.result()
    wait_for(lambda: server.has_ended, server.activity)
    return End(texts, cards, build, server.process.returncode)


def is_under_way(http: httpx.Client) -> bool:
    listed = http.get("/v1/pools").json()
    return bool(listed["running_requests"] + listed["waiting_requests"])


def test_a_drain_waits_for_a_build(end: End) -> None:
    assert end.build.status_code == 201
    assert end.status == 0


@pytest.fixture(scope="module")
def again(
    server: RunningServer, end: End, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The server started again on the same pools, with a short deadline for loads."""
    deadline = ("--load-deadline", str(DEADLINE_SECONDS))
    with serve(tmp_path_factory.mktemp("again"), *server.arguments, *deadline) as running:
        yield running


def test_pools_survive_a_restart(end: End, again: RunningServer) -> None:
    with again.http() as http:
        after = cards_of(http)
    assert sorted(after) == ["base", "code", "late", "math", "poems", "tiny"]
    kept = ("content_hash", "experts_per_layer", "persisted", "default", "description")
    expected = {**end.cards, "late": end.build.json()}
    for name, card in after.items():
        assert [card[key] for key in kept] == [expected[name][key] for key in kept]
    with again.client() as client:
        assert text_of(client, "poems") == end.texts["math"]
        assert text_of(client, "emo") == end.texts["law"]  # math was redefined


@pytest.mark.parametrize("stream", [False, True])
def test_a_wait_past_the_deadline_is_a_503_even_for_a_stream(
    again: RunningServer, stream: bool
) -> None:
    """Math, code and poems are what math, code and law were: two of them fit."""
    with again.client() as client, again.http() as http:

        def states(key: str) -> list[Any]:
            return [http.get(f"/v1/pools/{pool}").json()[key] for pool in ("math", "code")]

        hold_only(http, "math", "code")
        with (
            stopped_engine(again),
            RawRequest(again, model="math", prompt="a"),
            RawRequest(again, model="code", prompt="a"),
        ):
            wait_for(lambda: states("running_requests") == [1, 1])
            start = time.monotonic()
            with pytest.raises(openai.InternalServerError) as refusal:
                client.completions.create(model="poems", prompt="a", max_tokens=1, stream=stream)
            waited = time.monotonic() - start
        assert refusal.value.status_code == 503
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        message = error_of(refusal.value)["message"]
        assert f"was not loaded within {DEADLINE_SECONDS} s" in message
        assert waited >= DEADLINE_SECONDS
        wait_for(lambda: states("state") == ["resident"] * 2)
        client.completions.create(model="math", prompt="a", max_tokens=1)  # open again


@dataclass(frozen=True)
class Death:
    """What a client and an open page were told when the engine was killed; no page, no words."""

    received: bytes
    status: int
    answer: str = ""
    notice: str = ""


@pytest.fixture(scope="module")
def death(again: RunningServer) -> Death:
    """Kill the engine, which ends the server: nothing can be asked of it any more."""
    (engine,) = engines_of(again)
    with ExitStack() as stack:
        page = None if CHROMIUM is None else stack.enter_context(playground(again))
        http = stack.enter_context(again.http())
        request = stack.enter_context(RawRequest(again, model="math", prompt=["a"] * 100))
        request.read_events(1)
        engine.suspend()  # so that nothing ends before the engine does
        if page is not None:
            before = running(http, "math")
            page.get_by_role("button", name="Answer").click()
            wait_for(lambda: running(http, "math") > before)
        engine.kill()
        request.read_to_end()
        wait_for(lambda: again.has_ended, again.activity)
        told = (request.received, again.process.returncode)
        if page is None:
            return Death(*told)
        answer, alert = answer_of(page, "math"), page.get_by_role("alert")
        wait_for(lambda: "failed" in answer.inner_text())
        wait_for(lambda: "No connection" in alert.inner_text())
        return Death(*told, answer.inner_text(), alert.inner_text())


@contextmanager
def playground(server: RunningServer) -> Iterator[Any]:
    """Open the console where math is about to be asked."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev`")
    with sync.sync_playwright() as chromium:
        browser = chromium.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{server.url}/console#playground")
        page.get_by_label("API key or admin key").fill(ADMIN)
        page.keyboard.press("Enter")
        page.locator("#status").filter(has_text="Live").wait_for()
        choose(page, "math")
        yield page
        browser.close()


def test_a_dead_engine_ends_streams_and_the_server(death: Death) -> None:
    assert b'"code": 500' in death.received
    assert death.status == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_dead_engine_is_told_to_a_page_that_is_open(death: Death) -> None:
    assert "failed" in death.answer
    assert death.notice.startswith("No connection: ")
    assert death.notice.endswith("What you see is old; trying again.")


@pytest.mark.server("shipped")
def test_sigterm_drains(server: RunningServer, http: httpx.Client) -> None:
    """Running requests finish, new ones get 503, then the process ends with status 0."""
    prompts = ["a"] * 64
    http.post("/v1/pools/python/load").raise_for_status()
    with ExitStack() as stack:
        with stopped_engine(server):
            request = stack.enter_context(
                RawRequest(server, model="python", prompt=prompts, max_tokens=450)
            )
            wait_for(lambda: running(http, "python") == len(prompts))
            server.terminate()
            wait_for(lambda: http.get("/ready").status_code == 503)
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/completions", json={"model": "python", "prompt": "a"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "shutting down" in refused.json()["error"]["message"]
            assert running(http, "python") > 0
        request.read_to_end()
    assert request.received.count(b'"finish_reason":"length"') == len(prompts)
    assert b"data: [DONE]" in request.received
    wait_for(lambda: server.has_ended, server.activity)
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def eager(golden_checkpoint: Path) -> tuple[str, ...]:
    """Arguments of a server that starts fast."""
    return (str(golden_checkpoint), *GOLDEN, "--enforce-eager")


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_and_a_status(
    eager: tuple[str, ...], tmp_path: Path
) -> None:
    with serve(tmp_path, *eager, "--drain-timeout", "0") as server:
        with RawRequest(server, prompt=["a"] * 100, max_tokens=450) as request:
            request.read_events(1)
            server.terminate()
            request.read_to_end()
        assert b'"code": 503' in request.received
        assert request.received.endswith(b"0\r\n\r\n")
        wait_for(lambda: server.has_ended, server.activity)
        assert server.process.returncode == CUT_STATUS


def test_a_killed_server_leaves_neither_processes_nor_sockets_nor_shared_memory(
    eager: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as base:  # a socket's path has at most 107 characters
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", base)
        with serve(tmp_path, *eager) as server:
            family = psutil.Process(server.process.pid).children(recursive=True)
            (engine,) = engines_of(server)
            maps = Path(f"/proc/{engine.pid}/maps").read_text()
            segments = {Path(name) for name in re.findall(r"/dev/shm/psm_\w+", maps)}
            sockets = [path for path in Path(base).rglob("*") if path.is_socket()]
            assert segments and sockets
            server.process.kill()
            wait_for(lambda: not any(map(is_alive, family)))
            wait_for(lambda: not list(Path(base).iterdir()))
            assert not any(segment.exists() for segment in segments)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_sigterm_gives_up_a_start_and_leaves_no_engine(
    eager: tuple[str, ...], tmp_path: Path
) -> None:
    with start(tmp_path, *eager) as server:
        wait_for(lambda: bool(engines_of(server)), server.activity)
        (engine,) = engines_of(server)
        server.terminate()
        wait_for(lambda: server.has_ended, server.activity)
        assert server.process.returncode == 128 + 15
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
