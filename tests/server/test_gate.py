"""The gate: what it lets through, counts, adds and refuses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from emo_serve.errors import EmoServeError, LoadDeadlineExceeded
from emo_serve.server.gate import Message, RequestGate, Scope, Send, current_request
from tests.fakes import settle


class FakeApp:
    """An ASGI app whose answer is held until the test lets it go."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.may_answer = asyncio.Event()
        self.headers_seen: list[tuple[str, ...]] = []
        self.retry_after_seconds: int | None = None

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        self.headers_seen.append(current_request().pool_headers)
        await self.may_answer.wait()
        current_request().retry_after_seconds = self.retry_after_seconds
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Client:
    """Speak ASGI to a gate and keep what it says."""

    def __init__(self, gate: RequestGate) -> None:
        self.gate = gate
        self.sent: list[Message] = []

    async def request(self, method: str = "POST", headers: Any = ()) -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": method, "headers": list(headers)}
        await self.gate(scope, receive, send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def test_what_is_under_way_is_counted_until_its_answer_ends() -> None:
    app = FakeApp()
    gate = RequestGate(app)
    tasks = [asyncio.create_task(Client(gate).request()) for _ in range(2)]
    await settle()
    assert gate.num_running == 2
    assert not await gate.idle(0)
    app.may_answer.set()
    await asyncio.gather(*tasks)
    assert gate.num_running == 0
    assert await gate.idle(0)


async def test_a_request_that_fails_or_is_cancelled_is_no_longer_counted() -> None:
    app = FakeApp()
    gate = RequestGate(app)
    task = asyncio.create_task(Client(gate).request())
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert gate.num_running == 0


async def test_closed_it_refuses_new_work_but_not_reading() -> None:
    app = FakeApp()
    app.may_answer.set()
    gate = RequestGate(app)
    gate.close()
    client = Client(gate)
    await client.request("POST")
    assert client.status == 503
    assert client.headers[b"retry-after"] == b"1"
    error = json.loads(client.sent[1]["body"])["error"]
    assert error["code"] == 503
    assert error["type"] == "Service Unavailable"
    assert "shutting down" in error["message"]
    assert app.headers_seen == []
    reader = Client(gate)
    await reader.request("GET")
    assert reader.status == 200


async def test_closed_it_finishes_what_was_let_in_before() -> None:
    app = FakeApp()
    gate = RequestGate(app)
    client = Client(gate)
    task = asyncio.create_task(client.request())
    await settle()
    gate.close()
    idle = asyncio.create_task(gate.idle(60))
    await settle()
    assert not idle.done()
    app.may_answer.set()
    await task
    assert client.status == 200
    assert await idle


async def test_the_pool_header_reaches_the_app_and_only_its_own_request() -> None:
    app = FakeApp()
    app.may_answer.set()
    gate = RequestGate(app)
    await Client(gate).request(headers=[(b"x-emo-pool", b"math"), (b"accept", b"*/*")])
    await Client(gate).request()
    await Client(gate).request(headers=[(b"x-emo-pool", b"\xe9"), (b"x-emo-pool", b"code")])
    assert app.headers_seen == [("math",), (), ("\xe9", "code")]
    assert current_request().pool_headers == ()


async def test_retry_after_is_sent_with_503_and_with_nothing_else() -> None:
    for status, expected in ((503, b"7"), (200, None)):
        app = FakeApp(status)
        app.retry_after_seconds = 7
        app.may_answer.set()
        client = Client(RequestGate(app))
        await client.request()
        assert client.headers.get(b"retry-after") == expected
    app = FakeApp(503)
    app.may_answer.set()
    client = Client(RequestGate(app))
    await client.request()
    assert b"retry-after" not in client.headers


async def test_other_protocols_pass_untouched() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: object, send: object) -> None:
        seen.append(scope)

    gate = RequestGate(app)
    gate.close()
    await gate({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


class Stream:
    """An app that begins a stream at once, as Starlette does, and then waits for its pool."""

    def __init__(self) -> None:
        self.admissions: list[asyncio.Future[EmoServeError | None]] = [
            asyncio.get_running_loop().create_future() for _ in range(2)
        ]

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        current_request().admissions += self.admissions
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: token", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def test_a_stream_begins_when_every_engine_request_has_its_pool() -> None:
    app = Stream()
    client = Client(RequestGate(app))
    request = asyncio.create_task(client.request())
    app.admissions[1].set_result(None)
    await settle()
    assert client.sent == []
    app.admissions[0].set_result(None)
    await request
    assert client.status == 200
    assert [message.get("body") for message in client.sent[1:]] == [b"data: token", b""]


async def test_a_stream_whose_pool_cannot_be_had_is_an_error_and_never_begins() -> None:
    app = Stream()
    client = Client(RequestGate(app))
    request = asyncio.create_task(client.request())
    app.admissions[0].set_result(None)
    app.admissions[1].set_result(LoadDeadlineExceeded("too late", retry_after_seconds=9))
    await request
    assert (client.status, client.headers[b"retry-after"]) == (503, b"9")
    assert len(client.sent) == 2
    assert json.loads(client.sent[1]["body"])["error"]["message"] == "too late"


async def test_a_client_that_leaves_before_its_stream_begins_is_let_go() -> None:
    app = Stream()
    gate = RequestGate(app)
    client = Client(gate)
    request = asyncio.create_task(client.request())
    await settle()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert (client.sent, gate.num_running) == ([], 0)
    assert not app.admissions[0].cancelled()  # others may look at it
