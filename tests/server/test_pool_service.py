"""From names to pools to leases, over a fake engine."""

from __future__ import annotations

import pytest

from emo_serve.errors import (
    ConfigError,
    PoolConflict,
    PoolNotResident,
    PoolTooLarge,
    RequestError,
    UnknownPool,
)
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.server.pool_choice import ModelNames
from emo_serve.server.pool_service import PoolService
from tests.fakes import SLOT_BYTES
from tests.server.pools import pool, service_of


def test_every_spelling_finds_its_pool() -> None:
    service = service_of()
    assert service.find("emo").name == "base"
    assert service.find("math").name == "math"
    assert service.find("emo", ["code"]).name == "code"
    union = service.find("math+code")
    assert union is service.find("emo:code+math")
    assert union.expert_ids == ((), (0, 1, 2, 3, 7), (0, 1, 2, 3, 7))


def test_the_base_pool_united_with_anything_is_the_base_pool() -> None:
    service = service_of()
    assert service.find("base+math").name == "base"
    assert service.find("base+hot").name == "base"
    with pytest.raises(UnknownPool, match="'nope'"):
        service.find("base+nope")


@pytest.mark.parametrize("model", ["gpt-4", "emo:nope", "math+nope", "emo:"])
def test_an_unknown_name_is_answered_with_what_exists(model: str) -> None:
    with pytest.raises(UnknownPool, match="code, hot, law, math; the model itself is 'emo'"):
        service_of().find(model)


def test_contradictions_and_impossible_unions_are_the_clients_to_mend() -> None:
    service = service_of()
    with pytest.raises(PoolConflict):
        service.find("math", ["code"])
    with pytest.raises(RequestError, match="router_temperature"):
        service.find("math+hot")


async def test_admitting_tells_now_what_a_lease_would_meet() -> None:
    service = service_of(slots=4)
    await service.manager.load(service.find("math"))
    assert service.admit("math").name == "math"
    with pytest.raises(PoolNotResident, match="'code' is not resident.*resident pools: math"):
        service.admit("code")
    with pytest.raises(PoolTooLarge, match="'base' can never be resident.*GiB.*math"):
        service.admit("emo")


async def test_status_and_snapshot_follow_loads_and_leases() -> None:
    service = service_of(default_pool="math")
    math = service.find("math")
    assert not service.status(math).is_resident
    await service.manager.load(math)
    async with service.lease(math) as lease:
        status = service.status(math)
        assert (status.row, status.running_requests, status.is_default) == (lease.row, 1, True)
        assert status.num_bytes == 2 * 3 * SLOT_BYTES  # two layers, two experts and the shared one
        snapshot = service.snapshot()
        running = {p.name: p.running_requests for p in snapshot.pools}
        assert running == {"base": 0, "code": 0, "hot": 0, "law": 0, "math": 1}
        assert {p.name for p in snapshot.pools if p.is_resident} == {"math"}
        assert (snapshot.slots, snapshot.slots_in_use) == (16, 6)
    assert service.status(math).running_requests == 0


async def test_a_union_shows_in_the_snapshot_while_it_holds_a_row() -> None:
    service = service_of()
    for name in ("math", "code"):
        await service.manager.load(service.find(name))
    union = service.find("math+code")
    async with service.lease(union):
        running = {p.name: p.running_requests for p in service.snapshot().pools}
        assert running["code+math"] == 1
    assert [p.name for p in service.pools] == ["base", "code", "hot", "law", "math"]


def test_a_default_pool_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(UnknownPool):
        service_of(default_pool="nope")


def test_a_pool_may_not_be_called_like_the_model() -> None:
    service = service_of()
    catalog = PoolCatalog([pool("emo", 1)])
    with pytest.raises(ConfigError, match="--served-model-name"):
        PoolService(ModelNames(("emo",)), service.pools[0], catalog, service.manager)
