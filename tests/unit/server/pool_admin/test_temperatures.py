"""Router temperatures of requests: within the operator's bound, and pools of their own."""

from __future__ import annotations

import pytest

from emo_serve.errors import PoolInUse, RequestError
from tests.support.pool_services import ServiceUnderTest, pool, service_of


def service_with(bounds: tuple[float, float] | None) -> ServiceUnderTest:
    return service_of(router_temperatures=bounds)


async def test_a_temperature_makes_a_pool_of_its_own_that_shares_all_slots() -> None:
    service = service_with((0.5, 2.0))
    own = service.residency.admit("math")
    cool = service.residency.admit("math", temperature=0.8)
    assert (cool.name, cool.router_temperature, cool.expert_ids) == ("math", 0.8, own.expert_ids)
    assert cool.content_hash != own.content_hash
    assert service.residency.admit("math", temperature=0.8) is cool
    async with service.residency.lease(own) as one, service.residency.lease(cool) as other:
        assert one.row != other.row
        assert service.manager.statistics().used_slots == sum(map(len, own.expert_ids))


async def test_the_pools_own_temperature_is_the_pool() -> None:
    service = service_with((0.5, 2.0))
    assert service.residency.admit("hot", temperature=2.0) is service.lookup.find("hot")
    assert service.residency.admit("emo", temperature=1.0) is service.lookup.base_pool


@pytest.mark.parametrize(
    ("bounds", "temperature", "message"),
    [
        (None, 0.8, "start the server with --router-temperatures LOW,HIGH"),
        ((0.5, 2.0), 0.49, "this server takes 0.5 to 2"),
        ((0.5, 2.0), 2.01, "asks for router temperature 2.01"),
    ],
)
async def test_what_the_operator_does_not_allow_is_refused(
    bounds: tuple[float, float] | None, temperature: float, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        service_with(bounds).residency.admit("math", temperature=temperature)


async def test_a_redefinition_takes_the_pools_of_all_temperatures_with_it() -> None:
    service = service_with((0.5, 2.0))
    for temperature in (None, 0.8, 1.5):
        async with service.residency.lease(
            service.residency.admit("math", temperature=temperature)
        ):
            pass
    assert len(service.manager.pools) == 3
    await service.definitions.add(pool("math", 2, 3, 4), replace=True)
    assert service.manager.pools == ()
    cool = service.residency.admit("math", temperature=0.8)
    assert cool.expert_ids[1] == (2, 3, 4, 7)


async def test_an_eviction_takes_the_pools_of_all_temperatures_with_it() -> None:
    service = service_with((0.5, 2.0))
    for temperature in (None, 0.8):
        async with service.residency.lease(
            service.residency.admit("math", temperature=temperature)
        ):
            pass
    await service.residency.evict("math")
    assert service.manager.pools == () and service.manager.statistics().used_slots == 0


async def test_evicting_all_takes_what_no_name_finds() -> None:
    service = service_with((0.5, 2.0))
    async with service.residency.lease(service.residency.admit("math", temperature=0.8)):
        pass
    await service.residency.load("code", pin=True)
    await service.residency.evict_all()
    assert [held.name for held in service.manager.pools] == ["code"]


async def test_an_eviction_does_not_wait_for_the_old_content_of_a_name() -> None:
    service = service_with((0.5, 2.0))
    old = service.residency.admit("math")
    async with service.residency.lease(old):
        await service.definitions.add(pool("math", 2, 3, 4), replace=True)
        await service.residency.load("math")
        assert len(service.manager.pools) == 2
        await service.residency.evict("math")
        assert [held.content_hash for held in service.manager.pools] == [old.content_hash]
    assert service.manager.pools == ()


async def test_an_eviction_that_is_refused_evicts_nothing() -> None:
    service = service_with((0.5, 2.0))
    await service.residency.load("math")
    async with service.residency.lease(service.residency.admit("math", temperature=0.8)):
        with pytest.raises(PoolInUse, match="1 running requests"):
            await service.residency.evict("math")
        assert len(service.manager.pools) == 2
