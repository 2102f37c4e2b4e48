"""What routers are told: pools by every name, as they come and go."""

from __future__ import annotations

import asyncio

from emo_serve.router_metrics import PoolsAtHand
from emo_serve.server.pool_admin.at_hand import pools_at_hand
from tests.support.fake_engine import FakeEngine
from tests.support.pool_services import ServiceUnderTest, service_of
from tests.unit.server.pool_admin.test_sizes import scored


def told(service: ServiceUnderTest) -> PoolsAtHand:
    return pools_at_hand(service.lookup, service.manager)


async def test_an_empty_server_says_how_many_pools_fit() -> None:
    assert told(service_of(slots=8)) == PoolsAtHand((), (), 5)  # the base pool and all in it
    assert told(service_of(slots=8, rows=3)).num_more == 3  # row 0 is the base pool's
    assert told(service_of(slots=3)).num_more == 1


async def test_a_resident_pool_has_all_its_names() -> None:
    service = service_of(slots=4)
    await service.residency.load("math")
    assert told(service).resident == ("math", "emo:math")
    assert told(service).awaited == ()
    await service.residency.load("code")
    await service.residency.evict("math")
    assert told(service).resident == ("code", "emo:code")


async def test_the_default_pool_is_also_the_models_name() -> None:
    service = service_of(default_pool="math")
    await service.residency.load("math")
    assert told(service).resident == ("math", "emo:math", "emo")
    base = service_of()
    await base.residency.load("base")
    assert told(base).resident[:3] == ("base", "emo:base", "emo")
    assert {"math", "emo:law"} <= set(told(base).resident), "its experts are those of every pool"


async def test_a_union_counts_while_it_has_room() -> None:
    service = service_of()
    await service.residency.load("math+code")
    resident = told(service).resident
    unions = {"code+math", "math+code", "emo:code+math", "emo:math+code"}
    assert set(resident) == unions | {"math", "emo:math", "code", "emo:code"}
    await service.residency.evict("math+code")
    assert told(service).resident == ()


async def test_a_pool_that_loads_or_waits_is_awaited_and_takes_its_room() -> None:
    engine = FakeEngine(is_holding=True)
    service = service_of(engine, slots=6)
    assert told(service).num_more == 3  # all but the base pool and law
    tasks = [asyncio.create_task(service.residency.load("math"))]
    await engine.next_held()
    assert told(service) == PoolsAtHand((), ("math", "emo:math"), 2)
    tasks.append(asyncio.create_task(service.residency.load("law")))
    await asyncio.sleep(0)
    assert told(service) == PoolsAtHand((), ("law", "emo:law", "math", "emo:math"), 1)
    engine.is_holding = False
    engine.held[0].release()
    await asyncio.gather(*tasks)
    assert set(told(service).resident) >= {"math", "law", "hot"}
    assert told(service).awaited == ()


async def test_a_size_is_at_hand_whatever_temperature_shares_its_name() -> None:
    service = service_of(router_temperatures=(0.5, 2.0))
    service.catalog.add(scored("sums", 0, 2, 4))
    for temperature in (0.8, None, 1.5):
        wanted = service.residency.admit("sums@2", temperature=temperature)
        async with service.residency.lease(wanted):
            pass
        assert ("sums@2" in told(service).resident) is (temperature != 0.8)
