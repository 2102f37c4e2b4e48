"""Several replicas' pools are one: services over fake engines, joined without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from emo_serve.cluster.shared import News, Stamp
from emo_serve.names import ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.ray_cluster import member as member_module
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.slots import SlotTable
from tests.support.fake_engine import SLOT_BYTES, FakeEngine
from tests.support.member_fleet import Fleet
from tests.support.pool_services import (
    EXPERTS_PER_LAYER,
    MOE_LAYERS,
    ServiceUnderTest,
    service_over,
)

LAYERS = [None, {"experts": [5]}, {"experts": [5, 6]}]
POEMS = {"format": "emo-pool/1", "name": "poems", "layers": LAYERS}
OTHER_POEMS = {**POEMS, "layers": [None, {"experts": [1]}, {"experts": [1, 2]}]}


@pytest.fixture
async def fleet() -> Fleet:
    fleet = Fleet()
    for name in ("a", "b", "c"):
        await fleet.start(name)
    return fleet


# -- definitions --


async def test_a_pool_defined_anywhere_is_everywhere(fleet: Fleet) -> None:
    async with fleet.at("b") as http:
        assert (await http.post("/v1/pools", json=POEMS)).status_code == 201
        (content,) = fleet.content("poems")
        assert content is not None
        assert (await http.post("/v1/pools", json=POEMS)).status_code == 409
    async with fleet.at("c") as http:
        answer = await http.post("/v1/pools", params={"replace": "true"}, json=OTHER_POEMS)
        assert answer.status_code == 200
        (other,) = fleet.content("poems")
        assert other != content
    async with fleet.at("a") as http:
        assert (await http.delete("/v1/pools/poems")).status_code == 200
        assert fleet.content("poems") == {None}
        assert (await http.delete("/v1/pools/poems")).status_code == 404


async def test_a_cut_is_everywhere(fleet: Fleet) -> None:
    scored = [None, *[{"experts": [1, 2], "scores": [0.1 * e for e in range(8)]}] * 2]
    async with fleet.at("a") as http:
        await http.post("/v1/pools", json={**POEMS, "layers": scored})
        body = {"name": "short", "experts": 1}
        assert (await http.post("/v1/pools/poems/cut", json=body)).status_code == 201
    assert len(fleet.content("short")) == 1
    assert None not in fleet.content("short")


async def test_two_operators_at_once_leave_one_content(fleet: Fleet) -> None:
    async with fleet.at("a") as first, fleet.at("b") as second:
        both = (
            first.post("/v1/pools", params={"replace": "true"}, json=POEMS),
            second.post("/v1/pools", params={"replace": "true"}, json=OTHER_POEMS),
        )
        answers = await asyncio.gather(*both)
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len(fleet.content("poems")) == 1
    assert None not in fleet.content("poems")


async def test_a_replica_that_joins_has_the_pools_and_pins_at_once(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools", json=POEMS)
        await http.delete("/v1/pools/law")
        await http.post("/v1/pools/poems/pin")
        await http.post("/v1/pools/code/pin")
        await http.post("/v1/pools/code/unpin")
    await fleet.start("d")
    assert len(fleet.content("poems")) == 1
    assert fleet.content("law") == {None}
    assert fleet.services["d"].residency.pinned_names == {"poems"}


async def test_what_was_not_heard_is_caught_up_with(fleet: Fleet) -> None:
    fleet.deaf = {"c"}
    async with fleet.at("a") as http:
        await http.post("/v1/pools", json=POEMS)
        assert len(fleet.content("poems")) == 2
    await fleet.members["c"].catch_up()
    assert len(fleet.content("poems")) == 1


async def test_replicas_keep_in_step_by_themselves(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_module, "_AGAIN_SECONDS", ())
    monkeypatch.setattr(member_module, "_STEADY_SECONDS", 0.001)
    fleet.deaf = {"c"}
    async with fleet.at("a") as http:
        await http.post("/v1/pools", json=POEMS)
    running = asyncio.create_task(fleet.members["c"].keep_in_step())
    while len(fleet.content("poems")) != 1:
        await asyncio.sleep(0.001)
    running.cancel()


async def test_the_same_content_is_not_defined_again(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools", json=POEMS)
    revisions = {name: service.catalog.revision for name, service in fleet.services.items()}
    news = fleet.members["a"].tell(())
    for member in fleet.members.values():
        await member.hear(news)
        await member.catch_up()
    assert revisions == {name: one.catalog.revision for name, one in fleet.services.items()}


async def test_news_that_cannot_be_followed_leave_the_rest(fleet: Fleet) -> None:
    bad = {**POEMS, "name": "bad", "layers": [None, {"experts": [99]}, {"experts": [99]}]}
    news = [
        News("pool", "bad", str(bad).replace("'", '"').replace("None", "null"), Stamp(50, "z")),
        News("pin", "bad", "", Stamp(51, "z")),
        News("pool", "law", None, Stamp(52, "z")),
    ]
    await fleet.members["a"].hear(news)
    assert fleet.services["a"].lookup.known("bad") is None
    assert fleet.services["a"].lookup.known("law") is None


async def test_files_are_written_where_a_change_arrives(tmp_path: Path) -> None:
    fleet = Fleet()
    writes: list[str] = []
    for name in ("a", "b"):
        service = stored_service(tmp_path)
        write = service.definitions._apply

        async def applied(change: Any, does: bool, name: str = name, write: Any = write) -> Any:
            writes.extend([name] * does)
            return await write(change, does)

        service.definitions._apply = applied  # type: ignore[method-assign]
        await fleet.start(name, service)
    async with fleet.at("b") as http:
        await http.post("/v1/pools", json=POEMS)
    assert writes == ["b"]
    assert (tmp_path / "poems.json").exists()
    assert fleet.services["a"].catalog.is_stored("poems")
    async with fleet.at("a") as http:
        await http.delete("/v1/pools/poems")
    assert writes == ["b", "a"]
    assert not (tmp_path / "poems.json").exists()


def stored_service(directory: Path) -> ServiceUnderTest:
    write_pool(ExpertPool.base(MOE_LAYERS, name="all"), directory / "all.json")
    catalog = PoolCatalog.read(directory, MOE_LAYERS, persists=True)
    table = SlotTable(EXPERTS_PER_LAYER, 8)
    manager = ResidencyManager(table, 6, FakeEngine(), slot_bytes=SLOT_BYTES)
    base = ExpertPool.base(MOE_LAYERS)
    return service_over(ModelNames(("emo",)), base, catalog, manager)


# -- residency --


async def test_a_load_goes_to_one_replica_or_to_several(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        card = (await http.post("/v1/pools/math/load")).json()
        assert card["resident"]
        first = [name for name, one in card["replicas"].items() if one["state"] == "resident"]
        assert len(first) == 1
        card = (await http.post("/v1/pools/math/load", params={"replicas": "2"})).json()
        two = [name for name, one in card["replicas"].items() if one["state"] == "resident"]
        assert len(two) == 2 and first[0] in two
        card = (await http.post("/v1/pools/math/evict", params={"replicas": "2"})).json()
        left = [name for name, one in card["replicas"].items() if one["state"] == "resident"]
        assert left == first
        assert not (await http.post("/v1/pools/math/evict")).json()["resident"]


async def test_evict_all_is_done_on_every_replica(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools/math/load", params={"replicas": "all"})
        await http.post("/v1/pools/law/pin", params={"replicas": "1"})
        answer = (await http.post("/v1/pools/evict-all")).json()
        held = [card["name"] for card in answer["data"] if card["state"] == "resident"]
        assert held == ["law"]
        name, service = next(iter(fleet.services.items()))
        async with service.residency.lease(service.lookup.find("math")):
            assert (await http.post("/v1/pools/evict-all")).status_code == 409, name


async def test_pins_are_everywhere_unless_told_otherwise(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools/code+math/pin")
        assert all("code+math" in one.residency.pinned_names for one in fleet.services.values())
        await http.post("/v1/pools/code+math/unpin")
        card = (await http.post("/v1/pools/law/pin", params={"replicas": "1"})).json()
    assert sum(one["pinned"] for one in card["replicas"].values()) == 1
    assert not any("code+math" in one.residency.pinned_names for one in fleet.services.values())


def pinning(fleet: Fleet, pool: str) -> set[str]:
    """Return the running replicas that have pinned a pool."""
    return {name for name in fleet.running if fleet.services[name].residency.is_pinned(pool)}


async def test_a_pin_on_some_replicas_moves_when_one_of_them_is_gone(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools/law/pin", params={"replicas": "2"})
    first = pinning(fleet, "law")
    assert len(first) == 2
    fleet.running.remove(min(first))
    for name in fleet.running:
        await fleet.members[name].move_pins()
    assert pinning(fleet, "law") == fleet.running
    await fleet.start("d")  # in place of the one that is gone
    for name in ("d", *fleet.running):
        await fleet.members[name].move_pins()
    assert len(pinning(fleet, "law")) == 2


async def test_pins_are_looked_at_only_when_other_replicas_run(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools/law/pin", params={"replicas": "3"})
    member, loads = fleet.members["b"], []
    await member.move_pins()
    monkeypatch.setattr(fleet.services["b"].residency, "load", loads.append)
    fleet.services["b"].residency.unpin("law")
    await member.move_pins()
    assert not loads


async def test_pins_can_be_taken_from_some_replicas(fleet: Fleet) -> None:
    async with fleet.at("b") as http:
        await http.post("/v1/pools/law/pin")
        await http.post("/v1/pools/law/unpin", params={"replicas": "1"})
        two = pinning(fleet, "law")
        await http.post("/v1/pools/law/pin", params={"replicas": "1"})
        (one,) = pinning(fleet, "law")
        assert (len(two), one in two) == (2, True)
        await http.post("/v1/pools/law/unpin", params={"replicas": "5"})
        assert not pinning(fleet, "law")
        assert (await http.post("/v1/pools/law/unpin", params={"replicas": "1"})).is_success
    await fleet.start("d")
    assert not pinning(fleet, "law")


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/pools/math/load?replicas=0", 400, "replicas is '0'; expected a number"),
        ("/v1/pools/math/load?replicas=many", 400, "expected a number from 1, or all"),
        ("/v1/pools/physics/load", 404, "physics"),
        ("/v1/pools/physics/pin", 404, "physics"),
        ("/v1/pools/base/unpin?replicas=all", 200, "base"),
    ],
)
async def test_what_cannot_be_placed_is_refused(
    fleet: Fleet, path: str, status: int, words: str
) -> None:
    async with fleet.at("a") as http:
        answer = await http.post(path)
    assert (answer.status_code, words in answer.text) == (status, True)


# -- reading --


async def test_the_list_is_merged_or_one_replicas(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        await http.post("/v1/pools/math/load", params={"replicas": "3"})
        answer = (await http.get("/v1/pools")).json()
        assert list(answer["replicas"]) == ["a", "b", "c"]
        one = (await http.get("/v1/pools", params={"replica": "b"})).json()
        assert "replicas" not in one
        assert answer["slots"]["used"] == 3 * one["slots"]["used"]
        assert (await http.get("/metrics", params={"replica": "c"})).json() == "c"
        missing = await http.get("/v1/pools", params={"replica": "x"})
        assert missing.status_code == 404
        assert "the replicas are: a, b, c" in missing.text


async def test_one_pool_is_merged_and_its_document_is_not(fleet: Fleet) -> None:
    async with fleet.at("a") as http:
        assert set((await http.get("/v1/pools/math")).json()["replicas"]) == {"a", "b", "c"}
        document = (await http.get("/v1/pools/math/document")).json()
        assert document["name"] == "math"
        assert (await http.get("/v1/pools/physics")).status_code == 404
