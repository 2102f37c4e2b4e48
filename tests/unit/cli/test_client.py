"""The HTTP client of `emo-serve pools`: what it sends, and what it makes of every answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from emo_serve.cli.client import PoolServer
from emo_serve.cli.connection import key_from
from emo_serve.errors import ConfigError, EmoServeError, RequestError, Unavailable

CARD = {"object": "pool", "name": "math"}


def server_of(
    answer: Callable[[httpx.Request], httpx.Response], url: str = "http://emo", **options: Any
) -> PoolServer:
    return PoolServer(url, transport=httpx.MockTransport(answer), **options)


def answering(status: int, body: object, **headers: str) -> PoolServer:
    return server_of(lambda request: httpx.Response(status, json=body, headers=headers))


def error(message: str, code: int) -> dict[str, object]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}


@pytest.mark.parametrize(
    ("ask", "line", "body"),
    [
        (lambda s: s.list_pools(), "GET /v1/pools", b""),
        (lambda s: s.list_pools(experts=True), "GET /v1/pools?experts=true", b""),
        (lambda s: s.show("a+b"), "GET /v1/pools/a+b", b""),
        (lambda s: s.show("a/../b c"), "GET /v1/pools/a%2F..%2Fb%20c", b""),
        (lambda s: s.load("math"), "POST /v1/pools/math/load", b'{"pin": false}'),
        (lambda s: s.load("math", pin=True), "POST /v1/pools/math/load", b'{"pin": true}'),
        (lambda s: s.evict("a"), "POST /v1/pools/a/evict", b'{"drain": false}'),
        (lambda s: s.evict("a", drain=True), "POST /v1/pools/a/evict", b'{"drain": true}'),
        (lambda s: s.evict_all(drain=True), "POST /v1/pools/evict-all", b'{"drain": true}'),
        (lambda s: s.pin("math"), "POST /v1/pools/math/pin", b""),
        (lambda s: s.unpin("math"), "POST /v1/pools/math/unpin", b""),
        (lambda s: s.add(b"{}"), "POST /v1/pools", b"{}"),
        (lambda s: s.add(b"{}", replace=True), "POST /v1/pools?replace=true", b"{}"),
        (lambda s: s.remove("math"), "DELETE /v1/pools/math", b""),
    ],
)
def test_each_call_is_one_request(
    ask: Callable[[PoolServer], object], line: str, body: bytes
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=CARD)

    with server_of(answer, key="s3cret") as server:
        assert ask(server) == CARD
    (request,) = asked
    assert f"{request.method} {request.url.raw_path.decode()}" == line
    assert request.content == body
    assert request.headers["authorization"] == "Bearer s3cret"
    assert ("content-type" in request.headers) == bool(body)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://emo:8000", "http://emo:8000/v1/pools"),
        ("http://emo:8000/", "http://emo:8000/v1/pools"),
        ("http://emo:8000/v1", "http://emo:8000/v1/pools"),
        ("http://emo:8000/v1/", "http://emo:8000/v1/pools"),
        ("https://emo/behind/proxy", "https://emo/behind/proxy/v1/pools"),
        ("localhost:8000", "http://localhost:8000/v1/pools"),
    ],
)
def test_a_url_may_be_written_as_for_openai_clients(given: str, asked: str) -> None:
    urls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        assert "authorization" not in request.headers
        return httpx.Response(200, json=CARD)

    server_of(answer, given).list_pools()
    assert urls == [asked]


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, error("layer 1: bad", 400), RequestError, "layer 1: bad"),
        (404, error("there is no pool 'x'", 404), RequestError, "there is no pool 'x'"),
        (409, error("in use", 409), RequestError, "in use"),
        (401, error("no key was sent", 401), RequestError, "sent; set EMO_SERVE_API_KEY"),
        (401, {"error": "Unauthorized"}, RequestError, "Unauthorized; set EMO_SERVE_API_KEY"),
        (403, error("may not", 403), RequestError, "may not; set EMO_SERVE_ADMIN_API_KEY"),
        (500, error("cannot be read", 500), Unavailable, "cannot be read"),
        (503, error("is full", 503), Unavailable, "is full; try again in 7 s"),
        (404, {"detail": "Not Found"}, ConfigError, "not with the pools of an emo-serve server"),
        (301, {}, ConfigError, "http://emo answers 301"),
        (200, {"object": "model"}, ConfigError, "not with the pools of an emo-serve server"),
        (200, [], ConfigError, "not with the pools of an emo-serve server"),
        (400, error("a\x1b[31m\nb", 400), RequestError, r"a\?\[31m b"),
    ],
)
def test_a_refusal_says_what_to_do(
    status: int, body: object, kind: type[EmoServeError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        answering(status, body, **{"retry-after": "7"}).list_pools()


def test_an_answer_that_is_no_json() -> None:
    for status in (200, 502):
        page = server_of(lambda _, status=status: httpx.Response(status, text="<html>"))
        with pytest.raises(ConfigError, match="not with the pools of an emo-serve server"):
            page.list_pools()


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (httpx.ConnectError("refused"), Unavailable, "no server answers at http://emo .refused"),
        (
            httpx.ReadTimeout("slow"),
            Unavailable,
            "within 3 s; a load or build that has begun continues",
        ),
        (httpx.ConnectTimeout("slow"), Unavailable, "within 3 s"),
        (httpx.RemoteProtocolError("bad"), Unavailable, "does not speak HTTP"),
    ],
)
def test_a_server_that_does_not_answer(
    failure: Exception, kind: type[EmoServeError], message: str
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure

    with pytest.raises(kind, match=message):
        server_of(fail, timeout_seconds=3).load("math")


@pytest.mark.parametrize("url", ["ftp://emo", "http://", "http://emo:port", "http://[::1"])
def test_a_url_that_can_be_none(url: str) -> None:
    with pytest.raises((ConfigError, Unavailable)):
        PoolServer(url, timeout_seconds=1).list_pools()


def test_a_real_connection_that_is_refused() -> None:
    with pytest.raises(Unavailable, match="is `emo-serve serve` running there"):
        PoolServer("http://127.0.0.1:1", timeout_seconds=5).list_pools()


def test_the_key_is_the_one_given_or_the_first_of_the_variables() -> None:
    known = {"EMO_SERVE_ADMIN_API_KEY": "a\n", "EMO_SERVE_API_KEY": "b", "VLLM_API_KEY": "c"}
    assert key_from("mine", known) == "mine"
    assert key_from(None, known) == "a"
    assert key_from(None, {**known, "EMO_SERVE_ADMIN_API_KEY": " "}) == "b"
    assert key_from("", {"VLLM_API_KEY": "c"}) == "c"
    assert key_from(None, {}) is None


def test_a_key_may_hold_any_letters() -> None:
    sent: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.extend(value for name, value in request.headers.raw if name == b"authorization")
        return httpx.Response(200, json=json.loads(json.dumps(CARD)))

    server_of(answer, key="schl\u00fcssel").list_pools()
    assert sent == ["Bearer schl\u00fcssel".encode()]


def test_a_stream_that_breaks_off_is_said() -> None:
    class Broken(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"event: pools\ndata: {}\n\n"
            raise httpx.RemoteProtocolError("peer closed connection")

    breaking = server_of(lambda request: httpx.Response(200, stream=Broken()))
    with breaking as server, server.follow() as events:
        assert next(events) == ("pools", {})
        with pytest.raises(Unavailable, match="http://emo broke off its answer: peer closed"):
            next(events)


def test_a_refused_stream_is_a_refusal() -> None:
    with (
        answering(401, error("a key is needed", 401)) as server,
        pytest.raises(RequestError, match="a key is needed; set EMO_SERVE_API_KEY"),
        server.follow(),
    ):
        raise AssertionError("there is no stream")
