"""`emo-serve chat`: what it sends, what it shows, and what its commands do."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from emo_serve.cli import chat as command
from emo_serve.cli.chat import Chat
from emo_serve.cli.client import PoolServer
from emo_serve.errors import RequestError, Unavailable
from tests.unit.cli.test_main import run

ASKED: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> Iterator[None]:
    ASKED.clear()
    yield


def stream(*chunks: object) -> bytes:
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([": ping\n\n", *events, "data: [DONE]\n\n"]).encode()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def answer(request: httpx.Request) -> httpx.Response:
    ASKED.append(json.loads(request.content))
    assert (request.url.path, request.headers["x-emo-coverage"]) == ("/v1/chat/completions", "true")
    if ASKED[-1].get("model") == "nope":
        return httpx.Response(404, json={"error": {"message": "there is no pool 'nope'"}})
    ends = {"choices": [], "usage": {"completion_tokens": 3}}
    says = {"choices": [], "emo_serve": {"coverage": 0.5}}
    content = stream(piece("4"), piece("2\x1b[2J"), ends, says)
    return httpx.Response(200, content=content, headers={"x-emo-pool": "math"})


@contextmanager
def server() -> Iterator[PoolServer]:
    with PoolServer("http://emo", transport=httpx.MockTransport(answer)) as asked:
        yield asked


def test_turns_are_remembered_and_told_apart() -> None:
    with server() as asked:
        chat = Chat(asked, "math", "Be brief.", {"temperature": 0.0})
        assert "".join(chat.ask("6 x 7?")) == "42\x1b[2J"
        list(chat.ask("Sure?"))
    first, second = ASKED
    assert (first["model"], first["temperature"], first["stream"]) == ("math", 0.0, True)
    assert [turn["role"] for turn in first["messages"]] == ["system", "user"]
    roles = [turn["role"] for turn in second["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert chat.last.startswith("math, first token after ")
    assert "3 tokens" in chat.last and chat.last.endswith("coverage 0.50")


def test_a_refused_turn_was_never_said() -> None:
    with server() as asked:
        chat = Chat(asked, "nope")
        with pytest.raises(RequestError, match="there is no pool 'nope'"):
            list(chat.ask("hello"))
    assert chat.turns == []


def test_an_error_in_the_stream_is_an_error() -> None:
    failed = stream({"error": {"message": "the engine died"}})
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=failed))
    with (
        PoolServer("http://emo", transport=transport) as asked,
        pytest.raises(Unavailable, match="the engine died"),
    ):
        list(Chat(asked, None).ask("hello"))


def test_commands_of_the_conversation() -> None:
    with server() as asked:
        chat = Chat(asked, None, turns=[{"role": "user", "content": "x"}])
        assert command._command(chat, "/pool", "math+code") == "asking math+code from now on"
        assert chat.pool == "math+code"
        assert command._command(chat, "/new") == "forgotten"
        assert chat.turns == []
        assert "/quit" in command._command(chat, "/help")
        assert command._command(chat, "/what").startswith("there is no command /what")
        assert "default pool" in command._command(chat, "/pool")
        assert chat.pool is None


def in_a_pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(
        command, "server_of", lambda arguments: PoolServer("http://emo", transport=transport)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_in_a_pipe_the_answer_is_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_pipe(monkeypatch, "6 x\n7?")
    assert run(capsys, "chat", "math", "--max-tokens", "9") == (0, "42?[2J\n", "")
    assert ASKED[0]["messages"] == [{"role": "user", "content": "6 x\n7?"}]
    assert (ASKED[0]["max_completion_tokens"], "temperature" in ASKED[0]) == (9, False)


def test_an_empty_pipe_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_pipe(monkeypatch, " \n")
    status, out, err = run(capsys, "chat")
    assert (status, out) == (2, "")
    assert "standard input is empty" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_it_talks_until_the_input_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_pipe(monkeypatch, "")
    lines = iter(["hello", "/pool nope", "hello?", "", "/pool math", "hello!"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    status, out, _ = run(capsys, "chat")
    assert status == 0
    assert out.startswith("the default pool at http://emo; ")
    assert out.count("42?[2J\n[math, first token after ") == 2
    assert "emo-serve: there is no pool 'nope'\n" in out
    assert [asked.get("model") for asked in ASKED] == [None, "nope", "math"]
