"""GET /v1/access says what each key opens, in the words with which a change would be refused."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from emo_serve.server.access import create_access_router
from emo_serve.server.asgi.keys import KeyGuard

API, ADMIN = "Clients1", "Operators1"


def client_of(*, api: bool, admin: bool, is_local: bool, key: str) -> httpx.AsyncClient:
    app = FastAPI()
    app.include_router(create_access_router())

    @app.delete("/v1/pools/{name}")
    async def remove(name: str) -> str:
        return name

    guard = KeyGuard(app, [API] * api, [ADMIN] * admin, (), is_local=is_local)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(guard)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@pytest.mark.parametrize("api", [False, True])
@pytest.mark.parametrize("admin", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize(
    ("key", "word"), [("", "none"), ("x", "unknown"), (API, "api"), (ADMIN, "admin")]
)
async def test_what_it_says_is_what_happens(
    api: bool, admin: bool, is_local: bool, key: str, word: str
) -> None:
    async with client_of(api=api, admin=admin, is_local=is_local, key=key) as client:
        answer = await client.get("/v1/access")
        change = await client.delete("/v1/pools/math")
    is_known = (key == API and api) or (key == ADMIN and admin)
    if api and not is_known:
        assert answer.status_code == 401
        return
    told = answer.json()
    assert told["key"] == (word if is_known or not key else "unknown")
    assert told["changes_pools"] is (change.status_code == 200)
    expected = None if told["changes_pools"] else change.json()["error"]["message"]
    assert told["refusal"] == expected
