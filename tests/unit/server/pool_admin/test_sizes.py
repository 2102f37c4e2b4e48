"""Pools at other sizes on a running server: who shares slots, and what a change leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from emo_serve.errors import (
    EmoServeError,
    PoolConflict,
    PoolTooLarge,
    RequestError,
    StateConflict,
    UnknownPool,
)
from emo_serve.metrics import pool_label
from emo_serve.names import ModelNames
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.at_hand import pools_at_hand
from emo_serve.server.pool_admin.status import Shares
from tests.support.fake_engine import SLOT_BYTES, FakeEngine, settle
from tests.support.pool_services import (
    NUM_EXPERTS,
    ServiceUnderTest,
    service_of,
    service_over,
)

BEST, BEST_OF_OTHERS = (0, 2, 4, 6, 1, 3, 5, 7), (5, 3, 1, 6, 4, 2, 0, 7)


def scored(name: str, *experts: int, best: tuple[int, ...] = BEST) -> ExpertPool:
    """Return a pool that ranks its experts so in both layers; the shared 7 is left out."""
    scores = tuple(-float(best.index(expert)) for expert in range(NUM_EXPERTS))
    layer = LayerExperts(experts, scores)
    return ExpertPool(name, (None, layer, layer))


def with_sums(
    engine: FakeEngine | None = None, default_pool: str = "base", **options: Any
) -> ServiceUnderTest:
    """Return a service that has a pool `sums` of the experts 0, 2, 4, 6 and 7, with scores."""
    service = service_of(engine, **options)
    service.catalog.add(scored("sums", 0, 2, 4, 6))
    names = ModelNames(("emo",), default_pool)
    return service_over(names, service.lookup.base_pool, service.catalog, service.manager)


@pytest.fixture
def service() -> ServiceUnderTest:
    return with_sums()


async def test_routers_are_told_of_a_size_in_use(service: ServiceUnderTest) -> None:
    await service.residency.load("sums@2")
    resident = pools_at_hand(service.lookup, service.manager).resident
    assert {"sums@2", "emo:sums@2"} <= set(resident)
    assert "sums" not in resident


# -- names --


def test_every_spelling_of_a_size_is_one_pool(service: ServiceUnderTest) -> None:
    find = service.lookup.find
    three = find("sums@3")
    assert three.expert_ids == ((), (0, 2, 7), (0, 2, 7))
    assert find("emo:sums@3") is three
    assert find("emo", ["sums@3"]) is three
    assert find("sums@3", ["sums@3"]) is three
    assert find("sums", experts=3) is three
    assert find("law+sums@3") is find("emo:sums@3+law")
    with pytest.raises(PoolConflict):
        find("sums", ["sums@3"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("sums@9", "no pool 'sums@9': the sizes of pool 'sums' are 1 to 8 experts per layer"),
        ("math@2", "no pool 'math@2': pool 'math' has no scores.*with sizes are: sums; the model"),
        ("base@4", "no pool 'base@4': the base pool has all experts, and no other size; the model"),
        ("base+sums@9", "no pool 'sums@9'"),
        ("emo@4", "no pool 'emo@4'; the pools are: code, hot, law, math, sums; the model itself"),
        ("auto@4", "'auto@4' is no pool: the server chooses the pool for 'auto' and serves it at"),
        ("sums+auto@4", "'auto' is no pool"),
    ],
)
def test_a_size_there_is_not_says_what_there_is(
    service: ServiceUnderTest, model: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        service.lookup.find(model)


# -- residency --


async def test_a_size_costs_nothing_beside_a_larger_one(service: ServiceUnderTest) -> None:
    await service.residency.load("sums")
    used = service.manager.statistics().used_slots
    small = service.lookup.find("sums@3")
    status = service.statuses.of(small)
    assert status.shares == Shares(alone=0, shared=6, missing=0)
    assert (status.kind, status.version, status.is_resident) == ("size", 1, True)
    async with service.residency.lease(small) as lease:
        assert lease.is_hit
        stats = service.manager.statistics()
        assert (stats.used_slots, stats.loads) == (used, 1), "only a row was published"
        await service.residency.evict("sums")
        assert service.manager.statistics().used_slots == 6
    service.manager.check_integrity()


async def test_a_size_is_served_where_its_pool_does_not_fit() -> None:
    engine = FakeEngine()
    service = with_sums(engine, slots=4)
    with pytest.raises(PoolTooLarge, match="--expert-slots to serve it, or ask for 'sums@4'"):
        service.residency.admit("sums")
    small = service.residency.admit("sums@4")
    async with service.residency.lease(small) as lease:
        assert engine.serves(lease.row, small)


async def test_sizes_in_use_are_listed_like_unions(service: ServiceUnderTest) -> None:
    await service.residency.load("sums@3")
    await service.residency.load("math+sums@3")
    names = ["base", "code", "hot", "law", "math", "sums"]
    listed = {status.pool.name: status for status in service.statuses.overview().pools}
    assert list(listed) == [*names, "math+sums@3", "sums@3"]
    assert [listed[name].kind for name in ("sums", "sums@3", "math+sums@3")] == [
        *("pool", "size", "union")
    ]
    assert [listed[name].sizes for name in ("base", "math", "sums", "sums@3")] == [
        *(None, None, range(1, 9), None)
    ]
    await service.residency.evict("sums@3")
    await service.residency.evict("math+sums@3")
    assert [status.pool.name for status in service.statuses.overview().pools] == names


async def test_requests_of_a_size_show_under_its_name_and_count_under_its_pool(
    service: ServiceUnderTest,
) -> None:
    async with (
        service.residency.lease(service.lookup.find("sums@5")),  # the same content as sums
        service.residency.lease(service.lookup.find("sums@3")),
        service.residency.lease(service.lookup.find("sums")),
    ):
        listed = {s.pool.name: s.running_requests for s in service.statuses.overview().pools}
        assert {name: listed[name] for name in ("sums", "sums@5", "sums@3")} == {
            "sums": 1,
            "sums@5": 1,
            "sums@3": 1,
        }
        assert len(service.manager.statistics().pools) == 2
        shown = [p for p in service.statuses.snapshot().pools if pool_label(p.name) == "sums"]
        assert sum(p.running_requests for p in shown) == 3
        assert shown[0].name == "sums", "the first says whether the pool itself is resident"


# -- definitions --


async def test_a_leased_size_keeps_its_experts_when_its_pool_is_redefined() -> None:
    engine = FakeEngine()
    service = with_sums(engine)
    old = service.residency.admit("sums@3")
    async with service.residency.lease(old) as lease:
        await service.definitions.add(scored("sums", 4, 5, best=BEST_OF_OTHERS), replace=True)
        new = service.residency.admit("sums@3")
        assert new.expert_ids == ((), (3, 5, 7), (3, 5, 7))
        assert new.content_hash != old.content_hash
        async with service.residency.lease(new) as other:
            assert engine.serves(other.row, new)
            assert engine.serves(lease.row, old)
        assert engine.serves(lease.row, old)
    held = [entry.content_hash for entry in service.manager.statistics().pools]
    assert held == [new.content_hash]
    service.manager.check_integrity()


async def test_a_removed_pool_takes_its_sizes_along_after_their_last_request(
    service: ServiceUnderTest,
) -> None:
    await service.residency.load("sums@2", pin=True)
    await service.residency.load("math+sums@4")
    async with service.residency.lease(service.residency.admit("sums@3")):
        await service.definitions.remove("sums")
        with pytest.raises(UnknownPool, match="the pools are: code, hot, law, math"):
            service.residency.admit("sums@3")
        assert [entry.name for entry in service.manager.statistics().pools] == ["sums@3"]
    assert service.manager.statistics().pools == ()
    assert service.residency.pinned_names == frozenset()
    service.manager.check_integrity()


async def test_a_pinned_size_is_pinned_again_when_its_pool_is_redefined(
    service: ServiceUnderTest,
) -> None:
    await service.residency.load("sums@3", pin=True)
    await service.definitions.add(scored("sums", 4, best=BEST_OF_OTHERS), replace=True)
    status = service.statuses.of(service.lookup.find("sums@3"))
    assert (status.is_pinned, status.state) == (True, "resident")
    assert len(service.manager.statistics().pools) == 1


async def test_a_definition_that_a_pinned_or_default_size_needs_is_kept() -> None:
    scoreless = ExpertPool("sums", (None, LayerExperts((1,)), LayerExperts((1,))))
    service = with_sums()
    await service.residency.load("sums@3", pin=True)
    with pytest.raises(RequestError, match="'sums@3' is pinned or the default pool.*no scores"):
        await service.definitions.add(scoreless, replace=True)
    service.residency.unpin("sums@3")
    await service.definitions.add(scoreless, replace=True)
    assert service.lookup.find("sums").expert_ids == ((), (1, 7), (1, 7))


async def test_the_default_may_be_a_size() -> None:
    service = with_sums(default_pool="sums@3+math")
    assert service.lookup.find("emo").name == "math+sums@3"
    assert service.statuses.of(service.lookup.find(None)).is_default
    scoreless = ExpertPool("sums", (None, LayerExperts((1,)), LayerExperts((1,))))
    with pytest.raises(RequestError, match="'sums@3.math' is pinned or the default pool"):
        await service.definitions.add(scoreless, replace=True)
    with pytest.raises(StateConflict, match="--default-pool"):
        await service.definitions.remove("sums")
    with pytest.raises(UnknownPool, match="the sizes of pool 'sums'"):
        with_sums(default_pool="sums@9")


async def test_a_content_stays_that_another_pools_size_has_too(service: ServiceUnderTest) -> None:
    """The smallest sizes of two pools are often one content: what every pool has."""
    service.catalog.add(scored("more", 4, 5, best=BEST_OF_OTHERS))
    first, second = service.lookup.find("sums@1"), service.lookup.find("more@1")
    assert first.content_hash == second.content_hash
    await service.residency.load("sums@1")
    await service.residency.load("more@1", pin=True)
    async with service.residency.lease(second):
        await service.definitions.remove("sums")
        status = service.statuses.of(service.lookup.find("more@1"))
        assert (status.state, status.is_pinned, status.running_requests) == ("resident", True, 1)
    assert service.statuses.of(service.lookup.find("more@1")).state == "resident"
    await service.definitions.remove("more")
    assert service.manager.statistics().pools == ()
    service.manager.check_integrity()


async def test_a_size_that_waits_is_let_in_by_its_own_load() -> None:
    engine = FakeEngine(is_holding=True)
    service = with_sums(engine)

    async def ask(name: str) -> int:
        async with service.residency.lease(service.residency.admit(name)) as lease:
            return lease.row

    large = asyncio.create_task(ask("sums"))
    load = await engine.next_held()
    small = asyncio.create_task(ask("sums@3"))
    await asyncio.sleep(0)
    status = service.statuses.of(service.lookup.find("sums@3"))
    assert (status.state, status.waiting_requests) == ("waiting", 1)
    load.release()
    await settle()
    (row_only,) = engine.held
    assert row_only.copies == ()
    row_only.release()
    assert await large != await small


# -- over HTTP --


def to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


@pytest.fixture
async def client(service: ServiceUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(create_router(service, to_http_error))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_a_preview_shows_bytes_and_what_is_missing_and_loads_nothing(
    service: ServiceUnderTest, client: httpx.AsyncClient
) -> None:
    await service.residency.load("sums@3")
    card = (await client.get("/v1/pools/sums")).json()
    assert (card["kind"], card["sizes"]) == ("pool", {"least": 1, "most": 8})
    preview = (await client.get("/v1/pools/sums", params={"experts": 4})).json()
    assert (preview["name"], preview["kind"]) == ("sums@4", "size")
    assert preview["experts"] == [[], [0, 2, 4, 7], [0, 2, 4, 7]]
    assert (preview["bytes"], preview["experts_missing"]) == (8 * SLOT_BYTES, 2)
    assert (preview["state"], preview["row"], preview["sizes"]) == ("absent", None, None)
    assert preview == (await client.get("/v1/pools/sums@4")).json()
    assert preview == (await client.get("/v1/pools/emo:sums%404")).json()
    assert len(service.manager.statistics().pools) == 1
    service.catalog.add(scored("more", 4, 5, best=BEST_OF_OTHERS))
    both = (await client.get("/v1/pools/sums+more", params={"experts": 3})).json()
    assert both["name"] == "more@3+sums@3"
    assert both["experts"] == [[], [0, 2, 3, 5, 7], [0, 2, 3, 5, 7]]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("sums?experts=9", 404, "the sizes of pool 'sums' are 1 to 8"),
        ("math?experts=2", 404, "has no scores"),
        ("emo?experts=2", 404, "the base pool has all experts, and no other size"),
        ("nope?experts=2", 404, "the pools are"),
        ("sums@3?experts=2", 400, "'sums@3' has a size already, and experts=2 gives another"),
        ("sums?experts=0", 422, "experts"),
        ("sums?experts=x", 422, "experts"),
        ("sums?experts=65537", 422, "experts"),
        ("sums?size=2", 422, "size"),
    ],
)
async def test_a_preview_of_what_cannot_be_is_refused(
    client: httpx.AsyncClient, path: str, status: int, message: str
) -> None:
    answer = await client.get(f"/v1/pools/{path}")
    assert (answer.status_code, message in answer.text) == (status, True), answer.text


async def test_a_size_is_loaded_pinned_and_evicted_but_not_removed(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.post("/v1/pools/sums@3/load")).json()["state"] == "resident"
    assert (await client.post("/v1/pools/sums@3/pin")).json()["pinned"]
    assert (await client.post("/v1/pools/sums@3/evict")).status_code == 409
    assert not (await client.post("/v1/pools/sums@3/unpin")).json()["pinned"]
    assert (await client.post("/v1/pools/sums@3/evict")).json()["state"] == "absent"
    gone = await client.delete("/v1/pools/sums@3")
    assert (gone.status_code, "it is a size of pool 'sums'" in gone.text) == (404, True)
    assert (await client.get("/v1/pools/sums")).status_code == 200
