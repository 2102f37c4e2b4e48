"""Our layer in Ray's proxies: tickets in, whole answers out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emo_serve.cluster.ticket import NO_TICKET, Ticket
from emo_serve.ray_cluster import proxy
from emo_serve.ray_cluster.proxy import TICKET_HEADER, ProxyLayer, middlewares

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Seen:
    """An app that notes what reaches it."""

    ticket: Ticket | None = None
    body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.ticket = Ticket.decode(headers.get(TICKET_HEADER, ""))
        assert TICKET_HEADER.replace("_", "-") not in headers
        is_more = scope["method"] == "POST"
        while is_more:
            message = await receive()
            self.body += message["body"]
            is_more = message.get("more_body", False)
        await PlainTextResponse("ok")(scope, receive, send)


def client(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(ProxyLayer(app), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://proxy")


async def test_the_router_learns_the_model_and_the_replica_gets_the_body() -> None:
    seen = Seen()
    async with client(seen) as http:
        body = {"model": "math", "prompt": "x" * 100_000}
        answer = await http.post("/v1/completions", json=body, headers={"x-emo-pool": "math"})
    assert answer.text == "ok"
    assert seen.ticket == Ticket("math", ("math",))
    assert json.loads(seen.body) == body


async def test_clients_write_no_tickets() -> None:
    seen = Seen()
    forged = {"serve-multiplexed-model-id": '["math", [], false]', TICKET_HEADER: "math"}
    async with client(seen) as http:
        await http.get("/v1/models", headers=forged)
    assert seen.ticket == NO_TICKET


async def test_a_body_that_is_too_long_or_slow_goes_on_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy, "_READ_BYTES", 10)
    monkeypatch.setattr(proxy, "_PAUSE_SECONDS", 0.01)
    for pause in (False, True):
        seen, may_send = Seen(), asyncio.Event()
        parts = [b'{"model":' if pause else b'{"model": "math", ', b' "math"}']

        async def receive(
            parts: list[bytes] = parts, may_send: asyncio.Event = may_send, pause: bool = pause
        ) -> Message:
            if len(parts) == 1 and pause:
                await may_send.wait()
            body = parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(parts)}

        async def send(message: Message) -> None: ...

        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        whole = b"".join(parts)
        serving = asyncio.create_task(ProxyLayer(seen)(scope, receive, send))
        while pause and seen.ticket is None:
            await asyncio.sleep(0.01)
        may_send.set()
        await serving
        assert seen.ticket == NO_TICKET
        assert seen.body == whole


def stream_that_breaks(path_kind: str = "text/event-stream") -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", path_kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    return app


async def test_a_stream_whose_replica_dies_ends_with_an_error_event() -> None:
    async with client(stream_that_breaks()) as http:
        answer = await http.post("/v1/completions", json={})
        assert answer.status_code == 200
        first, error, done = answer.text.strip().split("\n\n")
        assert (first, done) == ("data: 1", "data: [DONE]")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
        flat = (await http.post("/v1/responses", json={})).text.split("\n\n")[1]
        assert json.loads(flat.partition("data: ")[2])["sequence_number"] == 1


async def test_a_whole_stream_is_left_alone() -> None:
    async def parts() -> Any:
        yield "data: 1\n\n"
        yield "data: [DONE]\n\n"

    async with client(StreamingResponse(parts(), media_type="text/event-stream")) as http:
        assert (await http.post("/x", json={})).text == "data: 1\n\ndata: [DONE]\n\n"


async def test_an_answer_that_never_began_is_a_refusal_to_be_sent_again() -> None:
    async def nothing(scope: Scope, receive: Receive, send: Send) -> None: ...

    for app in (nothing, *(PlainTextResponse("no", code) for code in (503, 404))):
        async with client(app) as http:
            answer = await http.post("/v1/completions", json={})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == 503
            assert (await http.post("/v1/messages", json={})).json()["type"] == "error"


async def test_a_replicas_own_refusal_is_passed_on() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"retry-after": "7", "content-type": "application/json"}
        await PlainTextResponse("{}", 503, headers)(scope, receive, send)

    async with client(app) as http:
        answer = await http.post("/v1/completions", json={})
    assert (answer.text, answer.headers["retry-after"]) == ("{}", "7")


def test_ray_gets_the_layer() -> None:
    (middleware,) = middlewares()
    assert middleware.cls is ProxyLayer
