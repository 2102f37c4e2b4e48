"""GET /v1/pools over a fake engine."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from emo_serve.errors import EmoServeError
from emo_serve.server.pool_service import PoolService
from emo_serve.server.pools_api import create_router
from tests.fakes import SLOT_BYTES
from tests.server.pools import service_of


def client_of(service: PoolService) -> TestClient:
    def to_http_error(error: EmoServeError) -> Exception:
        return HTTPException(418, str(error))

    app = FastAPI()
    app.include_router(create_router(service, to_http_error))
    return TestClient(app)


async def test_the_list_shows_the_base_pool_and_every_pool() -> None:
    service = service_of(slots=4)
    await service.manager.load(service.find("math"))
    answer = client_of(service).get("/v1/pools").json()
    assert [card["name"] for card in answer["data"]] == ["base", "code", "hot", "law", "math"]
    assert {card["name"]: card["resident"] for card in answer["data"]} == {
        "base": False,
        "code": False,
        "hot": False,
        "law": False,
        "math": True,
    }
    assert answer["slots"] == {"total": 8, "used": 6, "bytes_per_slot": SLOT_BYTES}
    math = answer["data"][-1]
    assert math["experts_per_layer"] == [0, 3, 3]
    assert math["bytes"] == 6 * SLOT_BYTES
    assert math["row"] == 1
    assert math["running_requests"] == 0
    assert math["content_hash"] == service.find("math").content_hash
    assert answer["data"][0]["default"] is True


async def test_one_pool_shows_its_experts_and_a_union_is_a_pool() -> None:
    service = service_of()
    await service.manager.load(service.find("math"))
    async with service.lease(service.find("math")):
        card = client_of(service).get("/v1/pools/math").json()
    assert card["experts"] == [[], [0, 1, 7], [0, 1, 7]]
    assert card["running_requests"] == 1
    union = client_of(service).get("/v1/pools/math+code").json()
    assert (union["name"], union["resident"], union["row"]) == ("code+math", False, None)


async def test_an_unknown_pool_is_answered_by_the_table_of_errors() -> None:
    answer = client_of(service_of()).get("/v1/pools/nope")
    assert answer.status_code == 418
    assert "there is no pool 'nope'" in answer.json()["detail"]
