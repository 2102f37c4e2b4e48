"""Two replicas with vLLM's whole app and keys: each asks the other behind its check of keys."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from emo_serve.ray_cluster.fleet_routes import FleetRoutes
from emo_serve.ray_cluster.member import FleetMember
from tests.support.built_app import ADMIN, API, BuiltApp
from tests.support.golden.checkpoints import write_checkpoint
from tests.support.member_fleet import Fleet
from tests.support.pool_services import service_of

LAYERS = [None, {"experts": [5]}, {"experts": [5, 6]}]
POEMS = {"format": "emo-pool/1", "name": "poems", "layers": LAYERS}


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    checkpoint = write_checkpoint("shared1", tmp_path / "shared1")
    fleet = Fleet()
    for name in ("a", "b"):
        member, service = FleetMember(name, fleet), service_of()
        keys = ((API,), (ADMIN,))
        around = partial(FleetRoutes, member=member, peers=fleet)
        site = await BuiltApp.of(checkpoint, service=service, keys=keys, around=around)
        await fleet.join(member, service, site.app, ADMIN)
    return fleet


async def test_clients_and_operators_may_do_what_their_keys_open(fleet: Fleet) -> None:
    async with fleet.at("a", authorization=f"Bearer {API}") as http:
        answer = (await http.get("/v1/pools")).raise_for_status().json()
        assert list(answer["replicas"]) == ["a", "b"]
        assert (await http.get("/v1/pools", params={"replica": "b"})).is_success
        assert (await http.post("/v1/pools", json=POEMS)).status_code == 403
    async with fleet.at("a") as http:
        assert (await http.get("/v1/pools")).status_code == 401
    assert fleet.content("poems") == {None}
    async with fleet.at("b", authorization=f"Bearer {ADMIN}") as http:
        assert (await http.post("/v1/pools", json=POEMS)).status_code == 201
        card = (await http.post("/v1/pools/poems/pin")).raise_for_status().json()
        assert [one["pinned"] for one in card["replicas"].values()] == [True, True]
        unknown = await http.post("/v1/pools/nope/pin")
        assert (unknown.status_code, "nope" in unknown.json()["error"]["message"]) == (404, True)
    assert len(fleet.content("poems")) == 1
