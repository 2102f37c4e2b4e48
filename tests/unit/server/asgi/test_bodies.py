"""Bodies are bounded in size and time, however they come; a refused client can read why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from emo_serve.server.asgi import bodies
from emo_serve.server.asgi.bodies import BodyLimit

LIMIT = 10


class Echo:
    """An ASGI app that reads its body and keeps it, and notes who leaves."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.messages: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.messages.append(await receive())
        self.bodies.append(self.messages[0]["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


class Client:
    """Send parts of a body; after the last one nothing comes but the end of the connection."""

    def __init__(self, parts: Sequence[bytes], *, is_whole: bool = True) -> None:
        self.parts = list(parts)
        self.is_whole = is_whole
        self.sent: list[Message] = []
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        if self.parts:
            part = self.parts.pop(0)
            more = bool(self.parts) or not self.is_whole
            return {"type": "http.request", "body": part, "more_body": more}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(
        self, app: Any, *headers: tuple[bytes, bytes], path: str = "/v1/completions"
    ) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        await app(scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def answer(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


@pytest.fixture
async def at_once(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(bodies, "_LINGER_SECONDS", 0.0)
    yield


@pytest.mark.parametrize("parts", [[b""], [b"x"], [b"12345", b"67890"], [b"1"] * LIMIT])
async def test_a_body_within_the_limit_comes_in_one_message(parts: list[bytes]) -> None:
    app, client = Echo(), Client(parts)
    await client.ask(BodyLimit(app, LIMIT))
    assert (client.status, app.bodies) == (200, [b"".join(parts)])
    assert not app.messages[0]["more_body"]


async def test_what_comes_after_the_body_is_heard() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    client = Client([b"x"])
    client.left.set()
    await client.ask(BodyLimit(app, LIMIT))
    assert heard == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("parts", [[b"x" * 11], [b"x"] * 11, [b"12345", b"678901", b"x" * 99]])
async def test_a_longer_body_without_a_length_is_refused_as_soon_as_it_is_too_long(
    at_once: None, parts: list[bytes]
) -> None:
    app, client = Echo(), Client(parts, is_whole=False)
    await client.ask(BodyLimit(app, LIMIT))
    assert (client.status, app.bodies) == (413, [])
    message = client.answer["error"]["message"]
    assert "more than 10 bytes; the limit is 10 (--max-body-size)" in message
    assert (b"connection", b"close") in client.sent[0]["headers"]


async def test_a_longer_body_is_refused_by_its_length_before_it_is_read(at_once: None) -> None:
    app, client = Echo(), Client([], is_whole=False)
    await client.ask(BodyLimit(app, LIMIT), (b"content-length", b"11"))
    assert (client.status, app.bodies) == (413, [])
    assert "has 11 bytes" in client.answer["error"]["message"]


@pytest.mark.parametrize("length", [b"", b"-1", b"1e9", b"ten", b"9" * 99, "\u0663".encode()])
async def test_a_length_that_is_none_or_absurd_is_refused(at_once: None, length: bytes) -> None:
    app, client = Echo(), Client([b"x"])
    await client.ask(BodyLimit(app, LIMIT), (b"content-length", length))
    assert client.status == 400
    assert app.bodies == []


async def test_the_refusal_has_the_routes_shape(at_once: None) -> None:
    client = Client([b"x" * 11])
    await client.ask(BodyLimit(Echo(), LIMIT), path="/v1/messages")
    assert client.answer["type"] == "error"
    assert set(client.answer["error"]) == {"type", "message"}


async def test_a_body_that_stops_coming_is_refused(at_once: None) -> None:
    for options in ({"pause_seconds": 0.01}, {"read_seconds": 0.01}):
        app, client = Echo(), Client([b"x"], is_whole=False)
        await client.ask(BodyLimit(app, LIMIT, **options))
        assert (client.status, app.bodies) == (408, [])


async def test_a_client_that_leaves_in_its_body_is_not_answered() -> None:
    app, client = Echo(), Client([b"x"], is_whole=False)
    client.left.set()
    await client.ask(BodyLimit(app, LIMIT))
    assert (client.sent, app.bodies) == ([], [])


async def test_a_client_that_is_still_sending_is_heard_out_so_that_it_reads_its_refusal() -> None:
    client = Client([b"x" * 11, *[b"y"] * 50])
    await client.ask(BodyLimit(Echo(), LIMIT))
    assert client.parts == []
    *_, answer, last = client.sent
    assert answer["more_body"] and answer["body"]
    assert last == {"type": "http.response.body", "body": b""}


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_methods_that_only_read_pass(method: str) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["method"])

    scope = {"type": "http", "method": method, "path": "/", "headers": []}
    await BodyLimit(app, LIMIT)(scope, None, None)  # type: ignore[arg-type]
    assert seen == [method]
