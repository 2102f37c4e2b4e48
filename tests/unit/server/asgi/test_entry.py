"""A few requests at a time between their arrival and the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from emo_serve.server.asgi import entry
from emo_serve.server.asgi.context import RequestContext, current_request, entered
from emo_serve.server.asgi.entry import Entry


class App:
    """Routes that note who is inside, and go on when the test says so."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.asks: dict[int, asyncio.Event] = {}
        self.ends: dict[int, asyncio.Event] = {}
        self.ask: Callable[[Send], Any] = self.ask_the_engine
        self.refusals: list[str] = []
        self.sent: list[Message] = []
        self.layer = Entry(self, self.refusals.append, at_once=2, longest_line=6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = scope["number"]
        self.inside.append(number)
        await self.asks[number].wait()
        if scope.get("fails"):
            raise ValueError("no such thing")
        await self.ask(send)
        await self.ends[number].wait()

    async def ask_the_engine(self, _: Send) -> None:
        current_request().admission()

    async def answer(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def start(
        self, number: int, method: str = "POST", body: bytes = b"{}", **scope: object
    ) -> asyncio.Task[None]:
        self.asks[number], self.ends[number] = asyncio.Event(), asyncio.Event()

        async def send(message: Message) -> None:
            self.sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def serve() -> None:
            with entered(RequestContext()):
                full = {"type": "http", "method": method, "number": number, "headers": [], **scope}
                await self.layer(full, receive, send)

        return asyncio.create_task(serve())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("leaves_by", ["ask_the_engine", "answer"])
async def test_requests_enter_in_order_as_others_leave_and_running_ones_do_not_count(
    leaves_by: str,
) -> None:
    app = App()
    app.ask = getattr(app, leaves_by)
    tasks = [app.start(number) for number in range(5)]
    await settled()
    assert app.inside == [0, 1]
    app.asks[1].set()
    await settled()
    assert app.inside == [0, 1, 2]  # request 1 runs on, and counts no more
    app.asks[0].set()
    app.asks[2].set()
    await settled()
    assert app.inside == [0, 1, 2, 3, 4]
    for number in range(5):
        app.asks[number].set()
        app.ends[number].set()
    await asyncio.gather(*tasks)
    assert app.layer.num_free == 2


async def test_models_take_turns_so_that_a_flood_for_one_holds_up_no_other() -> None:
    app = App()
    bodies = [b'{"model": "math"}'] * 6 + [b'{"prompt": "x", "model":"law"}'] * 2
    tasks = [app.start(number, body=body) for number, body in enumerate(bodies)]
    tasks.append(app.start(8, body=b"{}", headers=[(b"x-emo-pool", b"code")]))
    await settled()
    for number in (0, 1, 2, 6, 8, 3, 7, 4, 5):
        assert number in app.inside
        app.asks[number].set()
        app.ends[number].set()
        await settled()
    assert app.inside == [0, 1, 2, 6, 8, 3, 7, 4, 5]
    await asyncio.gather(*tasks)
    assert app.layer.num_free == 2 and not app.layer._lines


async def test_a_line_that_is_too_long_takes_no_more_and_other_models_have_their_own() -> None:
    app = App()
    flood = [
        app.start(number, body=b'{"model": "math"}', path="/v1/completions") for number in range(8)
    ]
    await settled()
    refused = app.start(8, body=b'{"model": "math"}', path="/v1/completions")
    other = app.start(9, body=b'{"model": "law"}', path="/v1/completions")
    await settled()
    assert refused.done() and not other.done()
    assert app.refusals == ["too_many_queued"]
    start = app.sent[0]
    assert start["status"] == 503 and int(dict(start["headers"])[b"retry-after"]) >= 1
    for task in (*flood, other):
        task.cancel()
    await asyncio.gather(*flood, other, return_exceptions=True)
    assert app.layer.num_free == 2


async def test_reading_is_never_held() -> None:
    app = App()
    tasks = [app.start(0), app.start(1), app.start(2), app.start(3, method="GET")]
    await settled()
    assert app.inside == [0, 1, 3]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert app.layer.num_free == 2


async def test_one_that_fails_or_whose_client_leaves_gives_its_place_back() -> None:
    app = App()
    failing, leaving = app.start(0, fails=True), app.start(1)
    waiting = [app.start(number) for number in range(2, 5)]
    await settled()
    assert app.inside == [0, 1]
    waiting[0].cancel()  # before it has entered
    app.asks[0].set()
    leaving.cancel()
    await asyncio.gather(failing, leaving, waiting[0], return_exceptions=True)
    await settled()
    assert app.inside == [0, 1, 3, 4]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert app.layer.num_free == 2


async def test_what_takes_long_leaves_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_LONGEST_SECONDS", 0.05)
    app = App()
    tasks = [app.start(number) for number in range(3)]
    await settled()
    assert app.inside == [0, 1]
    async with asyncio.timeout(60):
        while app.inside != [0, 1, 2]:
            await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert app.layer.num_free == 2
