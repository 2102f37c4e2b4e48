"""`model: "auto"` in front of an app: what arrives there, and what does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from emo_serve.errors import EmoServeError, EngineDead, LoadDeadlineExceeded, RequestError
from emo_serve.names import ModelNames
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.asgi.bodies import BodyLimit
from emo_serve.server.asgi.context import current_request
from emo_serve.server.auto.middleware import AutoPool
from emo_serve.server.auto.prompt_text import Prompt
from tests.support.fake_engine import settle
from tests.support.pool_services import MOE_LAYERS, POOLS

MATH = POOLS[0]
BASE = ExpertPool.base(MOE_LAYERS)
NAMES = ModelNames(("emo",))
CHAT = "/v1/chat/completions"


class FakeChooser:
    """A chooser that answers what the test says, at once or when it is let go."""

    def __init__(self, answer: ExpertPool | EmoServeError = MATH) -> None:
        self.answer = answer
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.prompts: list[Prompt] = []
        self.was_cancelled = False

    async def choose(self, prompt: Prompt) -> ExpertPool:
        self.prompts.append(prompt)
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if isinstance(self.answer, EmoServeError):
            raise self.answer
        return self.answer

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        raise AssertionError("a request teaches nothing")

    def remove(self, name: str) -> None:
        raise AssertionError("a request removes nothing")


class FakeMetrics:
    def __init__(self) -> None:
        self.choices: list[str] = []
        self.refusals: list[str] = []

    def count_auto(self, pool: str, seconds: float) -> None:
        assert seconds >= 0
        self.choices.append(pool)

    def count_refusal(self, reason: str) -> None:
        self.refusals.append(reason)


class FakeApp:
    """Read the request to its end, and answer 200 unless its client leaves."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []
        self.pool_headers: list[tuple[str, ...]] = []
        self.receives: list[Receive] = []
        self.is_reading = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.receives.append(receive)
        self.pool_headers.append(current_request().pool_headers)
        body, more = b"", self.is_reading
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class World:
    """The limit of bodies, admission, inside it the layer under test, and inside that an app."""

    def __init__(
        self, answer: ExpertPool | EmoServeError = MATH, names: ModelNames = NAMES, root: str = ""
    ) -> None:
        self.app, self.chooser, self.metrics = FakeApp(), FakeChooser(answer), FakeMetrics()
        auto = AutoPool(self.app, names, self.chooser, self.metrics)
        self.admission, self.root = Admission(auto), root
        self.server = BodyLimit(self.admission, 2**20)
        self.sent: list[Message] = []
        self.left = asyncio.Event()

    async def request(
        self,
        body: Any,
        path: str = CHAT,
        *,
        method: str = "POST",
        headers: Sequence[tuple[bytes, bytes]] = (),
        pieces: int = 1,
    ) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = -(-len(text) // pieces) or 1
        parts = [text[start : start + size] for start in range(0, len(text), size)] or [b""]
        messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": place < len(parts) - 1}
            for place, part in enumerate(parts)
        ]

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        length = (b"content-length", str(len(text)).encode())
        scope = {"type": "http", "method": method, "path": path, "root_path": self.root}
        scope["headers"] = [length, *headers]
        await self.server(scope, receive, send)

    @property
    def document(self) -> Any:
        (body,) = self.app.bodies
        return json.loads(body)


def chat(model: object = "auto", text: str = "2 + 2 =", **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("model", ["auto", "emo:auto"])
async def test_the_chosen_pools_name_takes_the_place_of_auto(model: str, pieces: int) -> None:
    world = World()
    await world.request(chat(model, temperature=0.1, stream=True), pieces=pieces)
    assert world.document == chat("math", temperature=0.1, stream=True)
    assert world.chooser.prompts == [Prompt("2 + 2 =")]
    assert world.metrics.choices == ["math"]
    assert world.sent[0]["status"] == 200
    (length,) = (value for key, value in world.app.scopes[0]["headers"] if key == b"content-length")
    assert int(length) == len(world.app.bodies[0])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "2 + 2 ="}),
        ("/v1/responses", {"input": "2 + 2 ="}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "2 + 2 ="}]}),
    ],
)
async def test_every_route_that_generates_has_it(path: str, body: dict[str, object]) -> None:
    world = World()
    await world.request({"model": "auto", **body}, path)
    assert world.document == {"model": "math", **body}
    assert world.chooser.prompts == [Prompt("2 + 2 =")]


@pytest.mark.parametrize("model", ["emo", None, "", "auto"])
async def test_the_header_may_say_auto_and_is_cleared(model: str | None) -> None:
    world = World()
    await world.request(chat(model), headers=[(b"x-emo-pool", b"auto")])
    assert world.document["model"] == "math"
    assert world.app.pool_headers == [()]


async def test_a_body_without_a_model_may_be_for_auto_by_its_header() -> None:
    world = World()
    await world.request({"prompt": "1"}, "/v1/completions", headers=[(b"x-emo-pool", b"auto")])
    assert world.document == {"prompt": "1", "model": "math"}


@pytest.mark.parametrize(("default_pool", "model"), [("base", "emo"), ("code", "emo:base")])
async def test_the_base_pool_is_named_as_it_can_be(default_pool: str, model: str) -> None:
    world = World(BASE, ModelNames(("emo",), default_pool))
    await world.request(chat())
    assert world.document["model"] == model
    assert world.metrics.choices == ["base"]


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(chat()).replace("auto", "\\u0061ut\\u006F").encode(),
        json.dumps(chat()).encode("utf-16"),
        json.dumps(chat()).encode("utf-32-le"),
        json.dumps(chat()).encode("utf-8-sig"),
    ],
)
async def test_auto_is_read_however_json_spells_it(body: bytes) -> None:
    world = World()
    await world.request(body)
    assert world.document == chat("math")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(text="")),
        (CHAT, chat(text=" \n")),
        (CHAT, {"model": "auto", "messages": []}),
        (CHAT, {"model": "auto"}),
        (CHAT, {"model": "auto", "messages": 5}),
        ("/v1/completions", {"model": "auto", "prompt": ""}),
        ("/v1/completions", {"model": "auto", "prompt": [[]]}),
        ("/v1/responses", {"model": "auto", "input": []}),
        ("/v1/messages/count_tokens", chat()),
    ],
)
async def test_the_default_pool_serves_where_there_is_nothing_to_choose_by(
    path: str, body: dict[str, object]
) -> None:
    world = World(names=ModelNames(("emo",), "math"))
    await world.request(body, path, headers=[(b"x-emo-pool", b"auto")])
    assert world.document == body | {"model": "emo"}
    assert world.app.pool_headers == [()]
    assert (world.chooser.prompts, world.metrics.choices) == ([], [])


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chat("math"), []),
        (chat("emo", tool_choice="auto"), []),
        (chat("auto+math"), []),
        (chat("auto"), [(b"x-emo-pool", b"math")]),  # a conflict, which the app reports
        (chat("math"), [(b"x-emo-pool", b"auto")]),
        (chat("emo"), [(b"x-emo-pool", b"AUTO")]),
        (chat(["auto"]), []),
        (["auto"], []),
        (b'{"model": "auto", ', []),
        (b"\xff auto", []),
        (b"auto" + b"[" * 100_000, []),
        (b"", []),
    ],
)
async def test_everything_else_arrives_as_it_came(
    body: object, headers: list[tuple[bytes, bytes]]
) -> None:
    world = World()
    await world.request(body, headers=headers, pieces=2)
    (came,) = world.app.bodies
    assert came == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (world.chooser.prompts, world.metrics.choices) == ([], [])


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/pools"), ("POST", "/tokenize"), ("GET", "/v1/responses")]
    + [("POST", "/v2/completions")],
)
async def test_other_routes_are_not_even_read(method: str, path: str) -> None:
    world = World()
    world.app.is_reading = False
    await world.request(chat(), path, method=method)
    (receive,) = world.app.receives
    assert json.loads((await receive())["body"]) == chat()
    assert world.chooser.prompts == []


async def test_the_path_is_judged_without_the_root_path() -> None:
    world = World(root="/emo")
    await world.request(chat(), f"/emo{CHAT}")
    assert world.document["model"] == "math"


async def test_other_protocols_pass() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: object, send: object) -> None:
        seen.append(scope)

    auto = AutoPool(app, NAMES, FakeChooser(), FakeMetrics())
    await auto({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


@pytest.mark.parametrize(
    ("error", "status", "reason", "retry_after"),
    [
        (RequestError("nothing to choose"), 400, "bad_request", None),
        (LoadDeadlineExceeded("too late", 9), 503, "load_deadline", b"9"),
        (EngineDead("it died"), 500, "engine_dead", None),
    ],
)
async def test_what_stops_a_choice_is_told_in_openais_shape(
    error: EmoServeError, status: int, reason: str, retry_after: bytes | None
) -> None:
    world = World(error)
    await world.request(chat())
    start, body = world.sent
    assert start["status"] == status
    assert dict(start["headers"]).get(b"retry-after") == retry_after
    assert json.loads(body["body"])["error"]["message"] == str(error)
    assert (world.metrics.refusals, world.metrics.choices) == ([reason], [])
    assert world.app.scopes == []


async def test_a_client_that_leaves_ends_the_choice() -> None:
    world = World()
    world.chooser.may_answer.clear()
    request = asyncio.create_task(world.request(chat()))
    await settle()
    assert not request.done()
    world.left.set()
    await request
    assert world.chooser.was_cancelled
    assert (world.app.scopes, world.sent, world.metrics.choices) == ([], [], [])


async def test_a_request_that_is_cancelled_ends_the_choice() -> None:
    world = World()
    world.chooser.may_answer.clear()
    request = asyncio.create_task(world.request(chat()))
    await settle()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert world.chooser.was_cancelled
    assert world.admission.num_running == 0


async def test_a_few_choices_are_made_at_a_time_and_all_are_made() -> None:
    world = World()
    world.chooser.may_answer.clear()
    requests = [asyncio.create_task(world.request(chat())) for _ in range(20)]
    await settle()
    assert len(world.chooser.prompts) == 8
    requests[0].cancel()
    await settle()
    assert len(world.chooser.prompts) == 9
    world.chooser.may_answer.set()
    await asyncio.gather(*requests[1:])
    assert len(world.chooser.prompts) == 20 and len(world.app.bodies) == 19


async def test_the_app_is_told_of_a_client_that_leaves_later() -> None:
    world = World()
    await world.request(chat())
    (receive,) = world.app.receives
    leaving = asyncio.create_task(receive())  # type: ignore[arg-type]
    await settle()
    assert not leaving.done()
    world.left.set()
    assert (await leaving)["type"] == "http.disconnect"


async def test_a_client_that_leaves_inside_its_body_is_passed_on() -> None:
    world = World()
    messages: list[Message] = [
        {"type": "http.request", "body": json.dumps(chat()).encode(), "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError("the client has disconnected")

    await world.server(
        {"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send
    )
    assert (world.chooser.prompts, world.app.bodies, messages) == ([], [], [])
