"""Which key opens what; and that no spelling of a path gets past the guard to a route."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Scope

from emo_serve.server.asgi.errors import route_path
from emo_serve.server.asgi.keys import KeyGuard

OPEN = ("/health", "/metrics")
API, ADMIN, UNKNOWN = "Clients1", "Operators1", "Clients1-"


def app_of(root_path: str = "") -> FastAPI:
    """Return an app with the routes that matter, which answers what was reached."""
    app = FastAPI(root_path=root_path)

    def add(path: str, *methods: str) -> None:
        app.add_api_route(path, lambda: {"reached": path}, methods=list(methods))

    add("/v1/pools", "GET", "POST", "HEAD")
    add("/v1/pools/{name}", "GET", "DELETE")
    add("/v1/pools/{name}/load", "POST")
    add("/v1/models", "GET")
    add("/v1/completions", "POST")
    add("/tokenize", "POST")
    add("/health", "GET")
    add("/metrics", "GET")
    return app


def guarded(app: FastAPI, *keys: Sequence[str], is_local: bool = True) -> FastAPI:
    """Put the guard where the server puts it: around the routes, inside the app's middleware."""
    guard = KeyGuard(app.router.middleware_stack, *keys, is_local=is_local)
    app.router.middleware_stack = guard  # type: ignore[assignment]
    return app


def guard_of(*, api: bool, admin: bool, root_path: str = "", is_local: bool = True) -> FastAPI:
    return guarded(
        app_of(root_path),
        [API, "Clients2"] if api else [],
        [ADMIN, "Operators2"] if admin else [],
        OPEN,
        is_local=is_local,
    )


async def ask(
    guard: ASGIApp,
    method: str,
    target: str,
    key: str | None = None,
    header: str | None = None,
    scheme: str = "Bearer",
) -> tuple[int, dict[str, str], Any]:
    """Send one request as uvicorn would hand it over; return status, headers and body."""
    value = header if header is not None else f"{scheme} {key}" if key is not None else None
    scope: Scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(target),
        "raw_path": target.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [] if value is None else [(b"authorization", value.encode())],
        "server": ("test", 80),
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers, json.loads(body) if body else None


# For each kind of keys set, what no key, an unknown, an API and an admin key get: + the route,
# - 401, x 403.
TABLE = [
    ("GET", "/health", {"api": "+++ ", "admin": "++ +", "both": "++++"}),
    ("GET", "/metrics", {"api": "+++ ", "admin": "++ +", "both": "++++"}),
    ("GET", "/v1/models", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("POST", "/v1/completions", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("POST", "/tokenize", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("GET", "/v1/pools", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("HEAD", "/v1/pools", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("GET", "/v1/pools/math", {"api": "--+ ", "admin": "++ +", "both": "--++"}),
    ("POST", "/v1/pools", {"api": "--+ ", "admin": "-- +", "both": "--x+"}),
    ("DELETE", "/v1/pools/math", {"api": "--+ ", "admin": "-- +", "both": "--x+"}),
    ("POST", "/v1/pools/math/load", {"api": "--+ ", "admin": "-- +", "both": "--x+"}),
]


@pytest.mark.parametrize("keys_set", ["api", "admin", "both"])
@pytest.mark.parametrize(("method", "path", "opens"), TABLE)
async def test_the_table(method: str, path: str, opens: dict[str, str], keys_set: str) -> None:
    guard = guard_of(api=keys_set != "admin", admin=keys_set != "api")
    for key, mark in zip((None, UNKNOWN, API, ADMIN), opens[keys_set], strict=True):
        if mark == " ":
            continue
        status, headers, body = await ask(guard, method, path, key)
        assert status == {"+": 200, "-": 401, "x": 403}[mark], (key, body)
        if mark == "+":
            continue
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == status
        assert ("www-authenticate" in headers) == (status == 401)
        assert not any(secret in json.dumps(body) for secret in (API, ADMIN))


async def test_without_keys_everything_is_open() -> None:
    guard = guard_of(api=False, admin=False)
    for method, path, _ in TABLE:
        assert (await ask(guard, method, path))[0] == 200


@pytest.mark.parametrize("api", [False, True])
@pytest.mark.parametrize(("method", "path", "opens"), TABLE)
async def test_on_a_network_pools_change_only_for_an_admin_key(
    method: str, path: str, opens: dict[str, str], api: bool
) -> None:
    with_admin = guard_of(api=api, admin=True, is_local=False)
    without = guard_of(api=api, admin=False, is_local=False)
    changes_pools = "-" in opens["admin"]
    assert (await ask(with_admin, method, path, ADMIN))[0] == 200
    for key in (None, UNKNOWN, API, ADMIN):
        status, _, body = await ask(without, method, path, key)
        if changes_pools:
            assert status == 403
            assert "--admin-api-key" in body["error"]["message"]
            assert "\n" not in body["error"]["message"]
        else:
            local = await ask(guard_of(api=api, admin=False), method, path, key)
            assert (status, body) == (local[0], local[2])


@pytest.mark.parametrize("target", ["/v1/pools%0A", "/v1/%70ools", "/v1%2Fpools"])
async def test_on_a_network_no_spelling_changes_pools(target: str) -> None:
    guard = guard_of(api=False, admin=False, is_local=False)
    assert (await ask(guard, "POST", target))[0] == 403


async def test_every_key_of_a_list_opens_and_an_empty_one_is_none() -> None:
    guard = guard_of(api=True, admin=True)
    assert (await ask(guard, "GET", "/v1/models", "Clients2"))[0] == 200
    assert (await ask(guard, "POST", "/v1/pools", "Operators2"))[0] == 200
    empty = guarded(app_of(), ["", API], [""], OPEN)
    assert (await ask(empty, "GET", "/v1/models", ""))[0] == 401
    assert (await ask(empty, "POST", "/v1/pools", API))[0] == 200  # no admin key is set


async def test_a_preflight_passes_and_reaches_no_route_that_changes_anything() -> None:
    guard = guard_of(api=True, admin=True)
    for path in ("/v1/pools", "/v1/pools/math/load", "/v1/models"):
        assert (await ask(guard, "OPTIONS", path))[0] == 405


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {API}", 200),
        (f"bearer {API}", 200),
        (f"BEARER {API}", 200),
        (f"Basic {API}", 401),
        (API, 401),
        (f"Bearer  {API}", 401),
        (f"Bearer {API} ", 401),
        (f"Bearer {API}\x00", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("", 401),
        (f"Bearer {API.upper()}", 401),
    ],
)
async def test_the_header(header: str, status: int) -> None:
    guard = guard_of(api=True, admin=False)
    assert (await ask(guard, "GET", "/v1/models", header=header))[0] == status


async def test_a_key_may_hold_any_letters() -> None:
    guard = guarded(app_of(), ["schl\u00fcssel"], [], OPEN)
    assert (await ask(guard, "GET", "/v1/models", "schl\u00fcssel"))[0] == 200


TRICKS = [
    "/v1/pools/",
    "//v1/pools",
    "/v1//pools",
    "/v1/./pools",
    "/v1/x/../pools",
    "/%76%31/pools",
    "/v1%2Fpools",
    "/v1/%70ools",
    "/v1/pools%0A",
    "/v1/pools%00",
    "/v1/pools%20",
    "/v1/pools;x",
    "/v1/pools?x",
    "/v1/pools%3Fx",
    "/V1/Pools",
    "/%2e/v1/pools",
    "/v1/%2e%2e/v1/pools",
    "/health/../v1/pools",
    "/health%2F..%2Fv1/pools",
    "/metrics/../v1/pools",
    "/v1/pools/math/load",
    "/v1/pools/math/load/",
    "/v1/pools/math/load%0A",
    "/v1/pools/math%2Fload",
    "/v1/pools/%2e%2e/load",
    "/v1/pools/math/../x/load",
    "/v1/pools//load",
]


@pytest.mark.parametrize("root_path", ["", "/emo", "/v1"])
@pytest.mark.parametrize("target", TRICKS)
async def test_no_spelling_reaches_a_route_without_the_key(target: str, root_path: str) -> None:
    for prefix in {"", root_path}:
        for key in (None, API):
            status, _, body = await ask(
                guard_of(api=True, admin=True, root_path=root_path),
                "POST",
                f"{prefix}{target}",
                key,
            )
            assert status in (401, 403, 404, 405, 307), (prefix, key, body)
        status, _, body = await ask(
            guard_of(api=False, admin=True, root_path=root_path), "POST", f"{prefix}{target}"
        )
        assert status in (401, 404, 405, 307), (prefix, body)


async def test_some_of_these_spellings_do_reach_a_route() -> None:
    guard = guard_of(api=True, admin=True)
    reached = [t for t in TRICKS if (await ask(guard, "POST", t, ADMIN))[0] == 200]
    assert {"/v1/pools%0A", "/v1/%70ools", "/v1%2Fpools", "/v1/pools/math%2Fload"} <= set(reached)


@pytest.mark.parametrize("target", ["/health/", "//health", "/health%0A", "/Health", "/healthx"])
async def test_open_paths_are_exact(target: str) -> None:
    guard = guard_of(api=True, admin=False)
    assert (await ask(guard, "GET", target))[0] == 401


async def test_an_open_path_never_opens_a_change_of_pools() -> None:
    guard = guarded(app_of(), [API], [], ["/v1/pools"])
    assert (await ask(guard, "GET", "/v1/pools"))[0] == 200
    assert (await ask(guard, "POST", "/v1/pools"))[0] == 401


@pytest.mark.parametrize("root_path", ["", "/emo", "/emo/", "/", "/v1", "/e"])
@pytest.mark.parametrize(
    "path", ["/v1/pools", "/emo/v1/pools", "/emo", "/emo/", "/emov1/pools", "//v1", "/v", "/", ""]
)
def test_the_path_is_the_routers(path: str, root_path: str) -> None:
    scope = {"path": path, "root_path": root_path}
    assert route_path(scope) == get_route_path(scope)


async def test_a_path_below_the_root_path_is_guarded_as_without() -> None:
    guard = guard_of(api=True, admin=True, root_path="/emo")
    assert (await ask(guard, "GET", "/emo/health"))[0] == 200
    assert (await ask(guard, "POST", "/emo/v1/pools", API))[0] == 403
    assert (await ask(guard, "POST", "/emo/v1/pools", ADMIN))[0] == 200
    assert (await ask(guard, "POST", "/v1/pools", API))[0] == 403


# -- connections that are no requests --


async def connect(guard: Callable[..., Any], scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    return sent


async def accepting(scope: Scope, receive: Any, send: Any) -> None:
    await send({"type": f"{scope['type']}.accept"})


@pytest.mark.parametrize(("key", "is_open"), [(None, False), (UNKNOWN, False), (API, True)])
async def test_a_websocket_needs_a_key(key: str | None, is_open: bool) -> None:
    guard = KeyGuard(accepting, [API], [ADMIN], OPEN, is_local=True)
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    sent = await connect(guard, {"type": "websocket", "path": "/v1/realtime", "headers": headers})
    expected = (
        {"type": "websocket.accept"} if is_open else {"type": "websocket.close", "code": 1008}
    )
    assert sent == [expected]


async def test_the_lifespan_passes() -> None:
    guard = KeyGuard(accepting, [API], [ADMIN], OPEN, is_local=True)
    assert await connect(guard, {"type": "lifespan"}) == [{"type": "lifespan.accept"}]
