"""Admission: what it passes, counts, adds and refuses."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Scope, Send

from emo_serve.errors import EmoServeError, LoadDeadlineExceeded
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.asgi.context import current_request
from emo_serve.server.coverage import CoverageSum
from tests.support.fake_engine import settle


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
    """Speak ASGI to the admission layer and keep its answers."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.sent: list[Message] = []

    async def request(self, method: str = "POST", headers: Any = ()) -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        scope = {
            "type": "http",
            "path": "/v1/completions",
            "method": method,
            "headers": list(headers),
        }
        await self.admission(scope, receive, send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def test_what_is_under_way_is_counted_until_its_answer_ends() -> None:
    app = FakeApp()
    admission = Admission(app)
    tasks = [asyncio.create_task(Client(admission).request()) for _ in range(2)]
    await settle()
    assert admission.num_running == 2
    assert not await admission.idle(0)
    app.may_answer.set()
    await asyncio.gather(*tasks)
    assert admission.num_running == 0
    assert await admission.idle(0)


async def test_a_request_that_fails_or_is_cancelled_is_no_longer_counted() -> None:
    app = FakeApp()
    admission = Admission(app)
    task = asyncio.create_task(Client(admission).request())
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert admission.num_running == 0


async def test_closed_it_refuses_new_work_but_not_reading() -> None:
    app = FakeApp()
    app.may_answer.set()
    admission = Admission(app)
    admission.close()
    client = Client(admission)
    await client.request("POST")
    assert client.status == 503
    assert client.headers[b"retry-after"] == b"1"
    error = json.loads(client.sent[1]["body"])["error"]
    assert error["code"] == 503
    assert error["type"] == "Service Unavailable"
    assert "shutting down" in error["message"]
    assert app.headers_seen == []
    reader = Client(admission)
    await reader.request("GET")
    assert reader.status == 200


async def test_closed_it_finishes_what_was_let_in_before() -> None:
    app = FakeApp()
    admission = Admission(app)
    client = Client(admission)
    task = asyncio.create_task(client.request())
    await settle()
    admission.close()
    idle = asyncio.create_task(admission.idle(60))
    await settle()
    assert not idle.done()
    app.may_answer.set()
    await task
    assert client.status == 200
    assert await idle


async def test_the_pool_header_reaches_the_app_and_only_its_own_request() -> None:
    app = FakeApp()
    app.may_answer.set()
    admission = Admission(app)
    await Client(admission).request(headers=[(b"x-emo-pool", b"math"), (b"accept", b"*/*")])
    await Client(admission).request()
    await Client(admission).request(headers=[(b"x-emo-pool", b"\xe9"), (b"x-emo-pool", b"code")])
    assert app.headers_seen == [("math",), (), ("\xe9", "code")]
    assert current_request().pool_headers == ()


async def test_retry_after_is_sent_with_503_and_with_nothing_else() -> None:
    for status, expected in ((503, b"7"), (200, None)):
        app = FakeApp(status)
        app.retry_after_seconds = 7
        app.may_answer.set()
        client = Client(Admission(app))
        await client.request()
        assert client.headers.get(b"retry-after") == expected
    app = FakeApp(503)
    app.may_answer.set()
    client = Client(Admission(app))
    await client.request()
    assert b"retry-after" not in client.headers


async def test_other_protocols_pass_untouched() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: object, send: object) -> None:
        seen.append(scope)

    admission = Admission(app)
    admission.close()
    await admission({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
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
    client = Client(Admission(app))
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
    client = Client(Admission(app))
    request = asyncio.create_task(client.request())
    app.admissions[0].set_result(None)
    app.admissions[1].set_result(LoadDeadlineExceeded("too late", retry_after_seconds=9))
    await request
    assert (client.status, client.headers[b"retry-after"]) == (503, b"9")
    assert len(client.sent) == 2
    assert json.loads(client.sent[1]["body"])["error"]["message"] == "too late"


async def test_a_client_that_leaves_before_its_stream_begins_is_let_go() -> None:
    app = Stream()
    admission = Admission(app)
    client = Client(admission)
    request = asyncio.create_task(client.request())
    await settle()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert (client.sent, admission.num_running) == ([], 0)
    assert not app.admissions[0].cancelled()  # others may look at it


# -- a stream that asks the engine only in its body --

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


class LateStream:
    """An app that begins a stream, asks the engine when the test lets it, and goes on."""

    def __init__(self, num_early: int = 2) -> None:
        self.num_early = num_early
        self.may_ask, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.admission: asyncio.Future[EmoServeError | None] | None = None
        self.raises: Exception | None = None
        self.was_cancelled = False

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        for number in range(self.num_early):
            body = b"early %d" % number
            await send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            await self.may_ask.wait()
            current_request().pool_names.append("math")
            self.admission = current_request().admission()
            await self.may_go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.raises is not None:
            raise self.raises
        await send({"type": "http.response.body", "body": b"late", "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def begun(app: LateStream, method: str = "POST") -> tuple[Client, asyncio.Task[None]]:
    client = Client(Admission(app))
    request = asyncio.create_task(client.request(method))
    await settle()
    return client, request


async def asked(app: LateStream) -> tuple[Client, asyncio.Task[None]]:
    client, request = await begun(app)
    assert client.sent == []
    app.may_ask.set()
    await settle()
    assert client.sent == []
    return client, request


async def test_a_stream_that_asks_late_begins_with_its_pool_and_before_its_first_token() -> None:
    app = LateStream()
    client, request = await asked(app)
    assert app.admission is not None
    app.admission.set_result(None)
    await settle()
    assert client.headers[b"x-emo-pool"] == b"math"
    assert [message["body"] for message in client.sent[1:]] == [b"early 0", b"early 1"]
    app.may_go_on.set()
    await request
    assert body_of(client) == b"early 0early 1late"


async def test_a_stream_that_asks_late_and_is_refused_is_an_error_and_its_app_ends() -> None:
    app = LateStream()
    client, request = await asked(app)
    assert app.admission is not None
    app.admission.set_result(LoadDeadlineExceeded("too late", retry_after_seconds=9))
    await request
    assert (client.status, client.headers[b"retry-after"]) == (503, b"9")
    assert client.headers[b"x-emo-pool"] == b"math"
    assert json.loads(body_of(client))["error"]["message"] == "too late"
    assert app.was_cancelled


@pytest.mark.parametrize("late", [False, True])
async def test_a_refusal_that_is_raised_in_the_body_is_an_error(late: bool) -> None:
    app = LateStream()
    refused = RuntimeError("Caught handled exception, but response already started.")
    refused.__cause__ = LoadDeadlineExceeded("too late", retry_after_seconds=9)
    app.raises = refused
    client, request = await asked(app)
    if late:
        assert app.admission is not None
        app.admission.set_result(None)
        await settle()
    app.may_go_on.set()
    await request
    if not late:
        assert (client.status, client.headers[b"retry-after"]) == (503, b"9")
        return
    assert client.status == 200
    last = client.sent[-1]
    assert (b'"message": "too late"' in last["body"], last.get("more_body", False)) == (True, False)


async def test_a_fault_before_a_stream_has_begun_is_left_to_vllms_handlers() -> None:
    app = LateStream()
    fault = KeyError("a bug")
    app.raises = RuntimeError("Caught handled exception, but response already started.")
    app.raises.__cause__ = fault
    client, request = await asked(app)
    app.may_go_on.set()
    with pytest.raises(KeyError) as raised:
        await request
    assert raised.value is fault
    assert client.sent == []


async def test_a_stream_that_asks_for_nothing_is_not_held_for_long() -> None:
    client, request = await begun(LateStream(num_early=50))
    assert len(client.sent) == 51
    request.cancel()
    client, request = await begun(LateStream(), "GET")
    assert len(client.sent) == 3
    request.cancel()


async def test_a_client_that_leaves_a_stream_that_asks_late_is_let_go() -> None:
    app = LateStream()
    client, request = await asked(app)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert client.sent == []
    assert len(asyncio.all_tasks()) == 1


# -- pool and coverage on the way out --

WANTED = [(b"x-emo-coverage", b"true")]
FIELD = {"pool": "math", "coverage": 0.75, "routed_tokens": 4}


class Generates:
    """An app that answers with these bodies, after engine requests in these pools.

    Coverage is known when the test resolves it, in `coverages`.
    """

    def __init__(
        self,
        *bodies: bytes,
        pools: tuple[str, ...] = ("math",),
        kind: bytes = b"application/json",
        status: int = 200,
        encoding: bytes = b"",
    ) -> None:
        self.bodies, self.pools, self.status = bodies, pools, status
        self.headers = [(b"content-type", kind), (b"Content-Length", b"%d" % len(b"".join(bodies)))]
        if encoding:
            self.headers.append((b"content-encoding", encoding))
        if kind.startswith(b"text/event-stream"):
            del self.headers[1]
        self.coverages: list[asyncio.Future[CoverageSum | None]] = []

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        context = current_request()
        context.pool_names += self.pools
        if context.wants_coverage:
            loop = asyncio.get_running_loop()
            self.coverages = [loop.create_future() for _ in self.pools]
            context.coverages += self.coverages
        start = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        await send(start)
        for number, body in enumerate(self.bodies, 1):
            more = number < len(self.bodies)
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def resolve(self) -> None:
        """Say what was covered: 3/4 over all, however many engine requests there were."""
        for number, coverage in enumerate(self.coverages):
            coverage.set_result(None if number else CoverageSum(3.0, 4))


async def answered(app: Generates, headers: Any = WANTED) -> Client:
    client = Client(Admission(app))
    request = asyncio.create_task(client.request(headers=headers))
    await settle()
    app.resolve()
    await request
    return client


def body_of(client: Client) -> bytes:
    return b"".join(message["body"] for message in client.sent[1:])


@pytest.mark.parametrize(
    ("pools", "header"),
    [((), None), (("math",) * 3, b"math"), (("math", "code", "math"), b"math, code")],
)
async def test_the_pool_that_served_is_named_once(
    pools: tuple[str, ...], header: bytes | None
) -> None:
    for status in (200, 503):
        client = await answered(Generates(b"{}", pools=pools, status=status), headers=[])
        assert client.headers.get(b"x-emo-pool") == header
        assert body_of(client) == b"{}"
        assert b"x-emo-coverage" not in client.headers


async def test_a_whole_answer_has_the_coverage_in_header_and_body() -> None:
    for app in (Generates(b'{"id": "x"}'), Generates(b'{"id"', b': "x"}', pools=("math",) * 3)):
        client = await answered(app)
        assert json.loads(body_of(client)) == {"id": "x", "emo_serve": FIELD}
        assert client.headers[b"x-emo-coverage"] == b"0.7500"
        assert client.headers[b"x-emo-pool"] == b"math"
        lengths = [
            value for key, value in client.sent[0]["headers"] if key.lower() == b"content-length"
        ]
        assert lengths == [str(len(body_of(client))).encode()]


async def test_a_whole_answer_waits_for_every_engine_requests_coverage() -> None:
    app = Generates(b"{}", pools=("math", "math"))
    client = Client(Admission(app))
    request = asyncio.create_task(client.request(headers=WANTED))
    await settle()
    app.coverages[0].set_result(CoverageSum(3.0, 4))
    await settle()
    assert client.sent == []
    app.coverages[1].set_result(CoverageSum(0.0, 4))
    await request
    assert client.headers[b"x-emo-coverage"] == b"0.3750"


async def test_nothing_routed_is_no_header_and_null_in_the_body() -> None:
    app = Generates(b"{}")
    client = Client(Admission(app))
    request = asyncio.create_task(client.request(headers=WANTED))
    await settle()
    app.coverages[0].set_result(None)
    await request
    assert b"x-emo-coverage" not in client.headers
    assert json.loads(body_of(client))["emo_serve"]["coverage"] is None


@pytest.mark.parametrize(
    "app",
    [
        Generates(b"{}", pools=()),
        Generates(b'{"error": 1}', status=400),
        Generates(b"hello", kind=b"text/plain"),
    ],
    ids=["nothing generated", "error", "text"],
)
async def test_other_answers_are_left_as_they_are(app: Generates) -> None:
    client = await answered(app)
    assert [message["body"] for message in client.sent[1:]] == list(app.bodies)
    assert b"x-emo-coverage" not in client.headers
    assert client.headers[b"Content-Length"] == b"%d" % len(app.bodies[0])


async def test_a_compressed_body_is_left_as_it_is_beside_the_header() -> None:
    client = await answered(Generates(b"{}", encoding=b"gzip"))
    assert (body_of(client), client.headers[b"x-emo-coverage"]) == (b"{}", b"0.7500")


CHUNK = b'data: {"id":"1","object":"chat.completion.chunk","created":2,"model":"emo"}\n\n'
DONE = b"data: [DONE]\n\n"


async def test_a_stream_flows_and_gets_its_event_before_the_last() -> None:
    app = Generates(CHUNK, b"data: more\n\n", DONE, b"", kind=b"text/event-stream; charset=utf-8")
    client = Client(Admission(app))
    request = asyncio.create_task(client.request(headers=WANTED))
    await settle()
    assert [message["body"] for message in client.sent[1:]] == [CHUNK, b"data: more\n\n"]
    app.resolve()
    await request
    *_, event, done = body_of(client).removesuffix(b"\n\n").split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        **json.loads(CHUNK[6:]),
        "choices": [],
        "emo_serve": FIELD,
    }
    assert done == b"data: [DONE]"
    assert b"x-emo-coverage" not in client.headers
    assert [message["more_body"] for message in client.sent[1:]] == [True, True, True, False]


async def test_a_stream_that_does_not_end_with_done_is_left_as_it_is() -> None:
    bodies = (b"event: response.created\ndata: {}\n\n", b"event: response.completed\n", b"data: {}")
    client = await answered(Generates(*bodies, kind=b"text/event-stream"))
    assert body_of(client) == b"".join(bodies)


async def test_a_stream_without_a_wish_for_coverage_passes_message_by_message() -> None:
    app = Generates(CHUNK[:20], CHUNK[20:], DONE, kind=b"text/event-stream")
    client = await answered(app, headers=[(b"x-emo-coverage", b"false")])
    assert [message["body"] for message in client.sent[1:]] == list(app.bodies)


@pytest.mark.parametrize("values", [[b"maybe"], [b"true", b"false"]])
async def test_a_wish_that_cannot_be_read_is_a_400_and_runs_nothing(values: list[bytes]) -> None:
    app = FakeApp()
    admission = Admission(app)
    client = Client(admission)
    await client.request(headers=[(b"x-emo-coverage", value) for value in values])
    assert (client.status, app.headers_seen, admission.num_running) == (400, [], 0)
    error = json.loads(client.sent[1]["body"])["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["message"].startswith("x-emo-coverage is ")


async def test_a_refused_stream_names_its_pool() -> None:
    app = Stream()

    async def in_law(scope: Scope, receive: object, send: Send) -> None:
        current_request().pool_names.append("law")
        await app(scope, receive, send)

    client = Client(Admission(in_law))
    app.admissions[0].set_result(LoadDeadlineExceeded("too late", retry_after_seconds=9))
    await client.request(headers=WANTED)
    assert (client.status, client.headers[b"x-emo-pool"]) == (503, b"law")
