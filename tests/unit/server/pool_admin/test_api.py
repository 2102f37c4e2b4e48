"""/v1/pools over ASGI, with the real service and manager and a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from emo_serve.errors import EmoServeError, PoolFileError
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import PoolDocument, parse_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration, PoolModel
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.api import MAX_DOCUMENT_BYTES, create_router
from emo_serve.vllm_plugin.contract import PoolUsage
from tests.support.fake_engine import SLOT_BYTES, FakeEngine
from tests.support.pool_services import (
    EXPERTS_PER_LAYER,
    MOE_LAYERS,
    NOW,
    ServiceUnderTest,
    service_of,
    service_over,
)

LAYERS = [None, {"experts": [5]}, {"experts": [5, 6]}]
POEMS = {"format": "emo-pool/1", "name": "poems", "layers": LAYERS}
MATH = {**POEMS, "name": "math"}


def to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


def app_of(service: ServiceUnderTest) -> FastAPI:
    app = FastAPI()
    app.include_router(create_router(service, to_http_error))
    return app


@asynccontextmanager
async def client_of(service: ServiceUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def service() -> ServiceUnderTest:
    return service_of()


@pytest.fixture
async def client(service: ServiceUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


# -- reading --


async def test_the_list_shows_pools_and_slots(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    await service.residency.load("law")
    await service.residency.load("math", pin=True)
    async with service.residency.lease(service.lookup.find("math")):
        answer = (await client.get("/v1/pools")).json()
    assert [card["name"] for card in answer["data"]] == ["base", "code", "hot", "law", "math"]
    assert [card["kind"] for card in answer["data"]] == ["base", *["pool"] * 4]
    assert answer["slots"] == {
        "total": 16,
        "used": 12,
        "free": 4,
        "leased": 6,
        "bytes_per_slot": SLOT_BYTES,
        "used_bytes": 12 * SLOT_BYTES,
    }
    assert answer["experts_per_layer"] == list(EXPERTS_PER_LAYER)
    assert (answer["running_requests"], answer["waiting_requests"]) == (1, 0)
    assert (answer["object"], answer["refused"], answer["persists"]) == ("list", [], False)
    assert "holders" not in answer
    assert answer["data"][-1] == {
        "object": "pool",
        "name": "math",
        "kind": "pool",
        "description": "",
        "default": False,
        "version": 1,
        "persisted": False,
        "state": "resident",
        "resident": True,
        "pinned": True,
        "row": service.statuses.of(service.lookup.find("math")).row,
        "running_requests": 1,
        "waiting_requests": 0,
        "experts_per_layer": [0, 3, 3],
        "sizes": None,
        "experts_alone": 4,
        "experts_shared": 2,
        "experts_missing": 0,
        "bytes": 6 * SLOT_BYTES,
        "router_temperature": 1.0,
        "content_hash": service.lookup.find("math").content_hash,
        "hits": 1,
        "misses": 0,
        "coverage": None,
        "last_used": NOW,
    }
    assert answer["data"][0]["default"] is True
    assert answer["data"][1]["row"] is None


async def test_the_list_with_experts_is_a_map_of_the_slab(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    await service.residency.load("law")
    await service.residency.load("hot")
    answer = (await client.get("/v1/pools", params={"experts": True})).json()
    experts = {card["name"]: card["experts"] for card in answer["data"]}
    assert experts["math"] == [[], [0, 1, 7], [0, 1, 7]]
    layer = [0, 0, 0, 0, 1, 1, 2, 2]
    assert answer["holders"] == [[], layer, layer]
    used = sum(count > 0 for layer in answer["holders"] for count in layer)
    assert used == answer["slots"]["used"]


async def test_one_pool_shows_its_experts_and_a_union_is_a_pool(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    await service.residency.load("math")
    async with service.residency.lease(service.lookup.find("math")):
        card = (await client.get("/v1/pools/math")).json()
    assert card["experts"] == [[], [0, 1, 7], [0, 1, 7]]
    assert card["holders"][1] == [1, 1, 0, 0, 0, 0, 0, 1]
    assert card["running_requests"] == 1
    for path in ("math+code", "math%2Bcode", "emo:code+math"):
        union = (await client.get(f"/v1/pools/{path}")).json()
        assert (union["name"], union["state"], union["row"]) == ("code+math", "absent", None)
        assert union["version"] is None
    assert (await client.get("/v1/pools/base")).json()["kind"] == "base"
    assert (await client.get("/v1/pools/emo")).json()["kind"] == "base"


async def test_a_pool_comes_back_as_a_document_that_defines_it(client: httpx.AsyncClient) -> None:
    scores = [0.5, 0.25, 0, 0, 0, 0.25, 0, 0]
    layers = [None, {"experts": [0, 5], "scores": scores}, {"experts": [5, 6], "scores": scores}]
    poems = {**POEMS, "layers": layers, "description": "verse", "router_temperature": 1.5}
    defined = (await client.post("/v1/pools", json=poems)).json()
    answer = await client.get("/v1/pools/poems/document")
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document["layers"][1] == {"experts": [0, 5, 7], "scores": scores}
    again = await client.post("/v1/pools", json={**document, "name": "again"})
    assert again.json()["content_hash"] == defined["content_hash"]
    assert (await client.get("/v1/pools/base/document")).json()["name"] == "base"
    union = await client.get("/v1/pools/math+code/document")
    assert union.status_code == 400
    assert "is made of pools and has no document" in union.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/pools/nope"),
        ("DELETE", "/v1/pools/nope"),
        ("DELETE", "/v1/pools/math%0A"),
        ("POST", "/v1/pools/nope/load"),
        ("POST", "/v1/pools/math+nope/pin"),
        ("POST", "/v1/pools/nope/evict"),
        ("POST", "/v1/pools/nope/unpin"),
    ],
)
async def test_an_unknown_pool_is_answered_with_those_there_are(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 404
    assert "the pools are: code, hot, law, math; the model itself is 'emo'" in answer.text


# -- residency --


async def test_load_pin_unpin_evict(service: ServiceUnderTest, client: httpx.AsyncClient) -> None:
    card = (await client.post("/v1/pools/math/load")).raise_for_status().json()
    assert (card["name"], card["state"], card["pinned"]) == ("math", "resident", False)
    assert "experts" not in card
    card = (await client.post("/v1/pools/math/load", json={"pin": True})).json()
    assert card["pinned"]
    refused = await client.post("/v1/pools/math/evict")
    assert (refused.status_code, "unpin" in refused.text) == (409, True)
    assert not (await client.post("/v1/pools/math/unpin", json={})).json()["pinned"]
    assert (await client.post("/v1/pools/math/evict", content=b" ")).json()["state"] == "absent"
    assert (await client.post("/v1/pools/math+code/pin")).json()["name"] == "code+math"
    assert (await client.post("/v1/pools/code+math/unpin")).json()["pinned"] is False
    service.manager.check_integrity()


async def test_evict_waits_for_running_requests_when_asked_to(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    async with service.residency.lease(service.lookup.find("math")):
        assert (await client.post("/v1/pools/math/evict")).status_code == 409
        drain = asyncio.create_task(client.post("/v1/pools/math/evict", json={"drain": True}))
        while service.statuses.of(service.lookup.find("math")).state != "closing":
            await asyncio.sleep(0)
        listed = (await client.get("/v1/pools/math")).json()
        assert (listed["state"], listed["running_requests"]) == ("closing", 1)
    assert (await drain).json()["state"] == "absent"


async def test_evict_all_leaves_what_is_pinned(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    for name in ("math", "code"):
        (await client.post(f"/v1/pools/{name}/load")).raise_for_status()
    await client.post("/v1/pools/law/pin")
    async with service.residency.lease(service.lookup.find("math")):
        refused = await client.post("/v1/pools/evict-all")
        assert (refused.status_code, "'math' has 1 running" in refused.text) == (409, True)
        assert len(service.manager.pools) == 3, "if one may not go, none does"
        drain = asyncio.create_task(client.post("/v1/pools/evict-all", json={"drain": True}))
        while service.statuses.of(service.lookup.find("code")).state != "absent":
            await asyncio.sleep(0)
        assert not drain.done()
    answer = (await drain).json()
    law = service.lookup.find("law")
    assert [card["name"] for card in answer["data"] if card["row"] is not None] == ["law"]
    assert answer["slots"]["used"] == sum(map(len, law.expert_ids))
    assert (await client.post("/v1/pools/evict-all", json={"pin": True})).status_code == 400
    service.manager.check_integrity()


async def test_statuses_follow_the_table_of_errors() -> None:
    engine = FakeEngine()
    async with client_of(service_of(engine, slots=4)) as client:
        assert (await client.post("/v1/pools/base/load")).status_code == 400  # too large
        assert (await client.post("/v1/pools/math/pin")).status_code == 200
        assert (await client.post("/v1/pools/code/load")).status_code == 503  # blocked
        assert (await client.post("/v1/pools/math/unpin")).status_code == 200
        engine.unreadable = {(1, 2)}
        assert (await client.post("/v1/pools/code/load")).status_code == 500


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("load", '{"pni": true}', "body: a key of the body is 'pni'; expected one of pin"),
        ("load", '{"pin": "yes"}', "body: pin is 'yes'; expected true or false"),
        ("load", '{"pin": 1}', "body: pin is 1; expected true or false"),
        ("load", "[]", "body: the body is []; expected an object"),
        ("load", '{"pin"', "body: is not UTF-8 JSON"),
        ("evict", '{"pin": true}', "a key of the body is 'pin'; expected one of drain"),
        ("pin", '{"pin": true}', "a key of the body is 'pin'; expected no key at all"),
        ("unpin", "null", "body: the body is None; expected an object"),
    ],
)
async def test_a_bad_body_changes_nothing(
    service: ServiceUnderTest, client: httpx.AsyncClient, path: str, body: str, message: str
) -> None:
    answer = await client.post(f"/v1/pools/math/{path}", content=body)
    assert (answer.status_code, message in answer.json()["detail"]) == (400, True), answer.text
    assert service.manager.statistics().pools == ()


# -- usage --


def with_usage(service: ServiceUnderTest) -> ServiceUnderTest:
    """Return a service whose engine has routed ten tokens in `math` and none elsewhere."""
    math = service.lookup.find("math").content_hash
    counts = ((), (3, 0, 0, 0, 0, 0, 0, 10), (1, 2, 0, 0, 0, 0, 0, 10))
    nothing = PoolUsage(0, ((), (0,) * 8, (0,) * 8))

    async def usage_of(pool: ExpertPool) -> PoolUsage:
        return PoolUsage(10, counts) if pool.content_hash == math else nothing

    return service_over(
        service.lookup.names,
        service.lookup.pools[0],
        service.catalog,
        service.manager,
        usage_of=usage_of,
    )


async def test_usage_is_that_of_the_pools_own_experts(service: ServiceUnderTest) -> None:
    async with client_of(with_usage(service)) as client:
        answer = (await client.get("/v1/pools/emo:math/usage")).json()
    assert answer == {
        "object": "pool.usage",
        "name": "math",
        "content_hash": service.lookup.find("math").content_hash,
        "tokens": 10,
        "layers": [
            None,
            {"num_experts": 8, "experts": [0, 1, 7], "counts": [3, 0, 10]},
            {"num_experts": 8, "experts": [0, 1, 7], "counts": [1, 2, 10]},
        ],
    }


async def test_a_pool_or_union_that_was_never_resident_has_zeros(service: ServiceUnderTest) -> None:
    async with client_of(with_usage(service)) as client:
        for name, experts in (("law", [4, 5, 6, 7]), ("math+code", [0, 1, 2, 3, 7])):
            answer = (await client.get(f"/v1/pools/{name}/usage")).json()
            layer = {"num_experts": 8, "experts": experts, "counts": [0] * len(experts)}
            assert (answer["tokens"], answer["layers"]) == (0, [None, layer, layer])


async def test_pools_of_equal_content_share_an_account(service: ServiceUnderTest) -> None:
    service = with_usage(service)
    layer = {"experts": [0, 1]}
    async with client_of(service) as client:
        again = {**POEMS, "name": "sums", "layers": [None, layer, layer]}
        assert (await client.post("/v1/pools", json=again)).status_code == 201
        assert (await client.get("/v1/pools/sums/usage")).json()["tokens"] == 10


async def test_usage_of_an_unknown_pool_and_where_nothing_is_recorded(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/v1/pools/nope/usage")).status_code == 404
    answer = await client.get("/v1/pools/math/usage")
    assert (answer.status_code, "does not record" in answer.json()["detail"]) == (503, True)


# -- definitions --


async def test_a_pool_is_defined_served_redefined_and_removed(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    made = await client.post("/v1/pools", json=POEMS)
    assert made.status_code == 201
    assert (made.json()["version"], made.json()["experts_per_layer"]) == (1, [0, 2, 3])
    assert (await client.get("/v1/pools/poems")).json()["experts"] == [[], [5, 7], [5, 6, 7]]
    assert (await client.post("/v1/pools/poems+math/load")).status_code == 200
    again = await client.post("/v1/pools", json=POEMS)
    assert (again.status_code, "replace=true" in again.text) == (409, True)
    redefined = await client.post("/v1/pools?replace=true", json={**POEMS, "description": "new"})
    assert (redefined.status_code, redefined.json()["version"]) == (200, 2)
    assert redefined.json()["description"] == "new"
    gone = await client.delete("/v1/pools/poems")
    assert gone.json() == {"object": "pool", "id": "poems", "name": "poems", "deleted": True}
    assert (await client.get("/v1/pools/poems")).status_code == 404
    assert (await client.delete("/v1/pools/base")).status_code == 409
    assert (await client.delete("/v1/pools/math+code")).status_code == 404
    service.manager.check_integrity()


async def test_definitions_survive_a_restart(tmp_path: Path, service: ServiceUnderTest) -> None:
    def start() -> ServiceUnderTest:
        catalog = PoolCatalog.read(tmp_path, MOE_LAYERS, persists=True)
        return service_over(
            service.lookup.names, service.lookup.pools[0], catalog, service_of().manager
        )

    async with client_of(start()) as client:
        assert (await client.post("/v1/pools", json=POEMS)).json()["persisted"] is True
        assert (await client.post("/v1/pools", json=MATH)).status_code == 201
        assert (await client.get("/v1/pools")).json()["persists"] is True
    async with client_of(start()) as client:
        assert (await client.get("/v1/pools/poems")).json()["experts"] == [[], [5, 7], [5, 6, 7]]
        assert (await client.delete("/v1/pools/poems")).status_code == 200
    assert list(start().catalog.pools) == ["math"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [None, {"experts": [8]}, {"experts": [1]}]}, "layer 1: an expert is 8"),
        ({"layers": [None, {"experts": [True]}, {"experts": [1]}]}, "layer 1: experts[0] is True"),
        ({"layers": [None, {"experts": [1, 1]}, {"experts": [1]}]}, "expected each id once"),
        ({"layers": [{"experts": [1]}] * 3}, "layer 0: experts is [1]; expected null"),
        ({"layers": [None]}, "the number of layers is 1"),
        ({"layers": {}}, "body: layers is {}"),
        ({"format": "emo-pool/2"}, "body: format is 'emo-pool/2'"),
        ({"name": "Math"}, "body: name is 'Math'"),
        ({"name": "../math"}, "body: name is '../math'"),
        ({"name": "a+b"}, "'+' is reserved for unions"),
        ({"name": "base"}, "kept for all experts"),
        ({"name": "emo"}, "has the name of the model"),
        ({"router_temperature": 0}, "router_temperature is 0"),
        ({"exprets": 1}, "a key of the file is 'exprets'"),
    ],
)
async def test_a_bad_document_is_refused_with_field_layer_and_value(
    service: ServiceUnderTest, client: httpx.AsyncClient, change: dict[str, Any], message: str
) -> None:
    answer = await client.post("/v1/pools?replace=true", json=POEMS | change)
    assert (answer.status_code, message in answer.json()["detail"]) == (400, True), answer.text
    assert len(service.lookup.pools) == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is not UTF-8 JSON"),
        (b"{", "is not UTF-8 JSON"),
        (b"\xff", "is not UTF-8 JSON"),
        (b"null", "body: the file is None"),
        (b'{"name": "a", "name": "b"}', "key 'name' is given twice"),
        (b"[" * 100_000, "is not UTF-8 JSON"),
    ],
)
async def test_what_is_not_json_is_refused(
    client: httpx.AsyncClient, body: bytes, message: str
) -> None:
    answer = await client.post("/v1/pools", content=body)
    assert (answer.status_code, message in answer.text) == (400, True), answer.text


@pytest.mark.parametrize("query", ["replace=perhaps", "replcae=true", "replace=true&x=1"])
async def test_a_bad_query_is_refused(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.post(f"/v1/pools?{query}", json=POEMS)
    assert answer.status_code == 422  # vLLM's handler makes it a 400
    assert (await client.get("/v1/pools?maps=1")).status_code == 422


async def test_a_large_pool_fits_and_an_endless_body_does_not(
    client: httpx.AsyncClient,
) -> None:
    scores = tuple(1 / (expert + 3) for expert in range(1024))
    layer = LayerExperts(tuple(range(1024)), scores)
    document = {"experts": layer.experts, "scores": layer.scores}
    body = json.dumps({**POEMS, "layers": [document] * 64}, indent=2).encode()
    assert 2 * 2**20 < len(body) < MAX_DOCUMENT_BYTES
    answer = await client.post("/v1/pools", content=body)
    assert "the number of layers is 64" in answer.json()["detail"]
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * 2**20

    for path in ("/v1/pools", "/v1/pools/math/load"):
        answer = await client.post(path, content=endless())
        assert answer.status_code == 413
    assert sent <= 12


# -- the documents --


def test_every_field_of_a_document_is_read_and_described() -> None:
    pool = ExpertPool(
        "poems",
        (None, LayerExperts((1, 2), (0.5, 1.0, 2.0)), LayerExperts((1,), (1.0, 2.0))),
        2.0,
        "all fields",
        PoolModel("emo", "fed", ((), (2,), ())),
        PoolCalibration("router", 3, 4, 5, 2),
        default_experts=2,
    )
    document = {
        "format": "emo-pool/1",
        "name": "poems",
        "layers": [
            None,
            {"experts": [1, 2], "scores": [0.5, 1.0, 2.0]},
            {"experts": [1], "scores": [1.0, 2.0]},
        ],
        "router_temperature": 2.0,
        "description": "all fields",
        "default_experts": 2,
        "model": {"name": "emo", "fingerprint": "fed", "implied": [[], [2], []]},
        "calibration": {
            "method": "router",
            "documents": 3,
            "tokens": 4,
            "seed": 5,
            "experts": 2,
        },
    }
    assert parse_pool("body", document) == pool
    schema = PoolDocument.model_json_schema()
    assert set(schema["properties"]) == set(document)
    assert set(schema["required"]) == {"format", "name", "layers"}
    for bad in ({**document, "more": 1}, {**document, "name": "a+b"}, {"name": "poems"}):
        with pytest.raises(PoolFileError):
            parse_pool("body", bad)


def test_every_route_is_documented(service: ServiceUnderTest) -> None:
    documented = app_of(service).openapi()
    routes = {
        f"{method.upper()} {path}": entry
        for path, entries in documented["paths"].items()
        for method, entry in entries.items()
    }
    assert set(routes) == {
        "GET /v1/pools",
        "POST /v1/pools",
        "GET /v1/pools/{name}",
        "GET /v1/pools/{name}/cuts",
        "POST /v1/pools/{name}/cut",
        "GET /v1/pools/{name}/document",
        "GET /v1/pools/{name}/usage",
        "DELETE /v1/pools/{name}",
        *(f"POST /v1/pools/{{name}}/{verb}" for verb in ("load", "evict", "pin", "unpin")),
        "POST /v1/pools/evict-all",
    }
    for route, entry in routes.items():
        assert entry["description"], route
        assert ("requestBody" in entry) == route.startswith("POST"), route
    body = routes["POST /v1/pools"]["requestBody"]["content"]["application/json"]["schema"]
    document, build = body["anyOf"]
    assert document["additionalProperties"] is build["additionalProperties"] is False
    assert "$ref" not in json.dumps(body)
    assert document["properties"]["layers"]["items"]["anyOf"][0]["properties"]["experts"]
    assert build["properties"]["examples"]["items"]["anyOf"][2]["properties"]["messages"]
    assert {"200", "201", "400", "401", "403", "409", "413"} <= set(
        routes["POST /v1/pools"]["responses"]
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router_temperature": 1e39}, "body: router_temperature is 1e+39; expected a finite"),
        ({"router_temperature": 1e-40}, "body: router_temperature is 1e-40; expected a finite"),
        ({"description": "\x00"}, "body: description is '\\x00'; expected text without control"),
        ({"description": "\ud800"}, "body: description is '\\ud800'; expected text without"),
        ({"model": {"name": "x" * 2000}}, "expected at most 1000 characters, not 2000"),
        ({"layers": [None, {"experts": [10**20]}, None]}, "layer 1: experts[0] is 1000000000"),
    ],
)
async def test_what_cannot_be_held_and_shown_again_is_not_defined(
    client: httpx.AsyncClient, fields: dict[str, Any], words: str
) -> None:
    before = (await client.get("/v1/pools")).json()["data"]
    answer = await client.post("/v1/pools", content=json.dumps(POEMS | fields))
    assert answer.status_code == 400 and words in answer.json()["detail"]
    assert (await client.get("/v1/pools")).json()["data"] == before
