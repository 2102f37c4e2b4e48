"""Every refusal of ours on every route of vLLM's app, as a browser sees it; no engine starts."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from emo_serve.errors import Draining, RequestError
from emo_serve.residency.backlog import BacklogLimits
from tests.support.built_app import ADMIN, API, MAX_BODY, ORIGIN, BuiltApp
from tests.support.fake_engine import FakeEngine, settle
from tests.support.golden.checkpoints import write_checkpoint
from tests.support.pool_services import POOLS, ServiceUnderTest, service_of

# vLLM's own protocol reads a field that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHAT = {"messages": [{"role": "user", "content": "a"}]}
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "a"},
    "/v1/messages": {**CHAT, "max_tokens": 4},
    "/invocations": CHAT,
}
"""Routes that take `stream` and `auto`."""

OTHERS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions/batch": {"messages": [CHAT["messages"]] * 2},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [1, 2]},
    "/tokenize": {"prompt": "a"},
    "/v1/messages/count_tokens": CHAT,
}
STREAMS = [(path, {**body, "stream": True}) for path, body in GENERATING.items()]
ASKING = [*GENERATING.items(), *STREAMS, *list(OTHERS.items())[:2]]
"""Routes that ask the engine."""
NAMING = [*ASKING, *list(OTHERS.items())[2:]]
"""Routes with a model."""
POSTING = [
    *NAMING,
    ("/detokenize", {"tokens": [1]}),
    ("/v1/pools", {}),
    ("/v1/pools/math/load", {}),
]

BROWSER = ("--allowed-origins", f'["{ORIGIN}"]', "--enable-request-id-headers")


async def nothing(site: BuiltApp) -> None:
    """Prepare nothing."""


async def draining(site: BuiltApp) -> None:
    site.admission.close()


async def queue_full(site: BuiltApp) -> None:
    """Have one request run that never ends, where one may."""
    site.engine.may_finish.clear()
    site.background = asyncio.create_task(
        ask(site, "/v1/completions", {"model": "math", "prompt": "a", "max_tokens": 2})
    )
    while not site.engine.num_running:
        await asyncio.sleep(0.001)


async def blocked(site: BuiltApp) -> None:
    await site.service.manager.load(POOLS[2], pin=True)


async def auto_fails(site: BuiltApp) -> None:
    site.chooser.failure = RequestError("no pool is good enough")


async def cut(site: BuiltApp) -> None:
    """Cut the request while it waits for its pool."""
    while not site.llm._running:
        await asyncio.sleep(0.001)
    site.llm.cut(Draining("the server stopped"))


@dataclass(frozen=True)
class Kind:
    """A kind of refusal: what is sent where, before and after which steps, and the answer."""

    status: int
    word: str
    text: str
    routes: list[tuple[str, dict[str, Any]]]
    model: str = "emo"
    headers: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[BuiltApp], Awaitable[None]] = nothing
    meanwhile: Callable[[BuiltApp], Awaitable[None]] = nothing
    service: Callable[[], ServiceUnderTest] = service_of
    padding: int = 0
    key: str = API


NOT_FOUND, BAD, BUSY = (
    (404, "NotFoundError"),
    (400, "BadRequestError"),
    (503, "Service Unavailable"),
)
KINDS = {
    "unknown pool": Kind(*NOT_FOUND, "no pool 'nope'", NAMING, "nope"),
    "unknown header": Kind(*NOT_FOUND, "no pool 'nope'", ASKING, "emo", {"x-emo-pool": "nope"}),
    "conflict": Kind(*BAD, "different pools", ASKING, "math", {"x-emo-pool": "code"}),
    "malformed header": Kind(*BAD, "x-emo-pool is 'A B'", ASKING, "emo", {"x-emo-pool": "A B"}),
    "coverage header": Kind(*BAD, "x-emo-coverage is", POSTING, "emo", {"x-emo-coverage": "x"}),
    "auto elsewhere": Kind(*BAD, "'auto' is no pool", list(OTHERS.items())[:3], "auto"),
    "auto": Kind(*BAD, "good enough", ASKING[:10], "auto", prepare=auto_fails),
    "queue full": Kind(
        *BUSY,
        "--max-queued",
        ASKING,
        "math",
        prepare=queue_full,
        service=lambda: service_of(limits=BacklogLimits(1, 0)),
    ),
    "blocked": Kind(
        *BUSY, "pinned", ASKING, "math", prepare=blocked, service=lambda: service_of(slots=4)
    ),
    "cut": Kind(
        *BUSY,
        "stopped",
        ASKING,
        "math",
        meanwhile=cut,
        service=lambda: service_of(FakeEngine(is_holding=True)),
    ),
    "draining": Kind(*BUSY, "shutting down", POSTING, prepare=draining),
    "too large": Kind(
        413, "Request Entity Too Large", "--max-body-size", POSTING, padding=MAX_BODY
    ),
    "no key": Kind(401, "Unauthorized", "no key", POSTING, key=""),
    "not the operator's key": Kind(403, "Forbidden", "--admin-api-key", POSTING[-2:]),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("model") / "shared1")


async def ask(
    site: BuiltApp, path: str, body: dict[str, Any], key: str = API, **headers: str
) -> httpx.Response:
    headers |= {"origin": ORIGIN, "x-request-id": "asked-7"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    async with site.client(**headers) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("root", ["", "/emo"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
async def test_a_refusal_is_the_routes(checkpoint: Path, kind: Kind, root: str) -> None:
    flags = (*BROWSER, "--root-path", root) if root else BROWSER
    site = await BuiltApp.of(checkpoint, *flags, service=kind.service(), keys=((API,), (ADMIN,)))
    await kind.prepare(site)
    for path, body in kind.routes:
        key = ADMIN if path.startswith("/v1/pools") and kind.key == API else kind.key
        if kind.status == 403:
            key = API
        sent = {"model": kind.model, **body}
        if kind.padding:
            sent["padding"] = "x" * kind.padding
        asking = asyncio.create_task(ask(site, path, sent, key, **kind.headers))
        await kind.meanwhile(site)
        answer = await asking
        check(answer, kind, path)
    assert site.admission.num_running == (kind.prepare is queue_full)


def check(answer: httpx.Response, kind: Kind, path: str) -> None:
    sent = answer.request.content.decode()[:200]
    what = f"{path} {sent}: {answer.status_code} {dict(answer.headers)} {answer.text[:400]}"
    assert answer.status_code == kind.status, what
    assert answer.headers["content-type"] == "application/json", what
    document = answer.json()
    if path.startswith("/v1/messages"):
        assert set(document) == {"type", "error"} and document["type"] == "error", what
        assert set(document["error"]) == {"type", "message"}, what
    else:
        assert set(document) == {"error"}, what
        assert set(document["error"]) == {"message", "type", "param", "code"}, what
        assert document["error"]["code"] == kind.status, what
    assert document["error"]["type"] == kind.word, what
    assert kind.text in document["error"]["message"], what
    assert answer.headers["access-control-allow-origin"] == ORIGIN, what
    assert "Origin" in answer.headers["vary"], what
    assert answer.headers.get_list("x-request-id") == ["asked-7"], what
    assert ("retry-after" in answer.headers) == (kind.status == 503), what
    assert ("www-authenticate" in answer.headers) == (kind.status == 401), what


# -- streams that ask the engine only once they have begun --

RESPONSE = {"model": "math", "input": "a", "stream": True}


async def test_a_stream_of_responses_names_its_pool_and_coverage(checkpoint: Path) -> None:
    site = await BuiltApp.of(checkpoint)
    answer = await ask(site, "/v1/responses", RESPONSE, **{"x-emo-coverage": "true"})
    assert answer.headers["x-emo-pool"] == "math"
    first, *_, last = events_of(answer)
    assert (first["type"], last["type"]) == ("response.created", "response.completed")
    report = last["response"]["emo_serve"]
    assert report == {"pool": "math", "coverage": 0.75, "routed_tokens": 4}


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    datas = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(data) for data in datas if data != "[DONE]"]


def error_event(path: str, number: int) -> list[dict[str, Any]]:
    kind, message = "Service Unavailable", "the server stopped"
    if path == "/v1/responses":
        flat = {"type": "error", "code": kind, "message": message, "param": None}
        return [{**flat, "sequence_number": number}]
    if path == "/v1/messages":
        return [{"type": "error", "error": {"type": kind, "message": message}}]
    return [{"error": {"message": message, "type": kind, "param": None, "code": 503}}]


@pytest.mark.parametrize(("path", "body"), STREAMS, ids=GENERATING)
async def test_a_running_stream_that_is_cut_ends_with_the_routes_error_event(
    checkpoint: Path, log: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    site = await BuiltApp.of(checkpoint)
    site.engine.may_finish.clear()
    asking = asyncio.create_task(ask(site, path, {"model": "math", **body}))
    while not site.engine.num_running:
        await asyncio.sleep(0.001)
    await settle()
    site.llm.cut(Draining("the server stopped"))
    answer = await asking
    assert answer.status_code == 200
    *others, last = events_of(answer)
    assert [last] == error_event(path, len(others))
    assert others
    is_openai = path not in ("/v1/responses", "/v1/messages")
    assert answer.text.endswith("data: [DONE]\n\n") == is_openai
    (record,) = [record for record in log.records if record.levelno >= logging.WARNING]
    assert record.exc_info is None
    assert "the server stopped" in record.getMessage()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_background_response_is_refused_like_any_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    site = await BuiltApp.of(checkpoint)
    body = {**RESPONSE, "model": "emo", "background": True, "store": True, "stream": stream}
    answer = await ask(site, "/v1/responses", body, **{"x-emo-pool": "nope"})
    assert answer.status_code == 404
    accepted = await ask(site, "/v1/responses", body)
    assert (accepted.status_code, accepted.headers["x-emo-pool"]) == (200, "base")
    await settle()
    gc.collect()  # a task's error that nobody retrieves is logged now


# -- the log --


@pytest.fixture
async def log(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[pytest.LogCaptureFixture]:
    """What vLLM's handlers get, and ours."""
    await BuiltApp.of(checkpoint)  # the first app of a process configures vLLM's logging anew
    caplog.set_level(logging.WARNING, "emo_serve")
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


async def test_refusals_are_logged_in_one_line_each(
    checkpoint: Path, log: pytest.LogCaptureFixture
) -> None:
    for name in ("unknown header", "queue full", "cut"):
        kind = KINDS[name]
        site = await BuiltApp.of(checkpoint, service=kind.service())
        await kind.prepare(site)
        log.clear()
        for path, body in kind.routes:
            asking = asyncio.create_task(
                ask(site, path, {"model": kind.model, **body}, **kind.headers)
            )
            await kind.meanwhile(site)
            assert (await asking).status_code == kind.status
        loud = [record for record in log.records if record.levelno >= logging.WARNING]
        assert 0 < len(loud) <= len(kind.routes)
        for record in loud:
            assert record.exc_info is None
            assert kind.text in record.getMessage()
            assert "\n" not in record.getMessage()


async def test_a_fault_is_logged_with_its_traceback(
    checkpoint: Path, log: pytest.LogCaptureFixture
) -> None:
    site = await BuiltApp.of(checkpoint)
    site.engine.failure = KeyError("a bug")
    answer = await ask(site, "/v1/completions", {"model": "math", "prompt": "a", "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    (record,) = [record for record in log.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError


# -- what other layers leave to ours --


async def test_vllms_own_check_of_keys_is_off(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "other")
    site = await BuiltApp.of(checkpoint, keys=((API,), ()))
    body = {"model": "math", "prompt": "a"}
    assert (await ask(site, "/v1/completions", body)).status_code == 200
    refused = await ask(site, "/v1/completions", body, key="other")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, 401)


# -- /invocations --

ADAPTER = "x-amzn-sagemaker-adapter-identifier"


@pytest.mark.parametrize("body", [CHAT, {"prompt": "a"}], ids=["chat", "completion"])
@pytest.mark.parametrize(
    ("model", "headers", "pool", "echoed"),
    [
        ("math", {}, "math", "math"),
        ("emo:code", {}, "code", "emo:code"),
        ("auto", {}, "math", "math"),
        ("emo", {}, "base", "emo"),
        (None, {}, "base", "emo"),
        ("", {}, "base", "emo"),
        ("emo", {"x-emo-pool": "law"}, "law", "emo"),
        ("emo", {"x-emo-pool": "auto"}, "math", "math"),
        (None, {ADAPTER: "code"}, "code", "code"),
        ("emo", {ADAPTER: "code"}, "code", "code"),
        ("code", {ADAPTER: "code"}, "code", "code"),
    ],
)
async def test_invocations_serves_the_model_that_is_named(
    checkpoint: Path,
    body: dict[str, Any],
    model: str | None,
    headers: dict[str, str],
    pool: str,
    echoed: str,
) -> None:
    site = await BuiltApp.of(checkpoint)
    sent = body if model is None else {"model": model, **body}
    answer = await ask(site, "/invocations", sent, **headers)
    assert (answer.status_code, answer.headers.get("x-emo-pool")) == (200, pool), answer.text
    assert answer.json()["model"] == echoed


@pytest.mark.parametrize(
    ("model", "headers", "status", "text"),
    [
        (7, {}, 400, "model is 7"),
        (["math"], {}, 400, "model is ['math']"),
        ("math", {ADAPTER: "code"}, 400, "different models"),
        ("math", {"x-emo-pool": "code"}, 400, "different pools"),
        ("no \u2603", {}, 404, "no pool 'no "),
        ("emo", {ADAPTER: "nope"}, 404, "no pool 'nope'"),
    ],
)
async def test_invocations_refuses_what_it_cannot_serve(
    checkpoint: Path, model: object, headers: dict[str, str], status: int, text: str
) -> None:
    site = await BuiltApp.of(checkpoint)
    answer = await ask(site, "/invocations", {"model": model, **CHAT}, **headers)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b"{}", b"\xff"])
async def test_bodies_that_invocations_cannot_read_are_vllms_to_refuse(
    checkpoint: Path, body: bytes
) -> None:
    site = await BuiltApp.of(checkpoint)
    async with site.client(**{"content-type": "application/json"}) as client:
        assert (await client.post("/invocations", content=body)).status_code == 400
