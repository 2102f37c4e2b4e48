"""Which smaller sizes may serve in a pool's stead, and what a request of an elastic pool gets."""

from __future__ import annotations

import pytest

from emo_serve.errors import UnknownPool
from emo_serve.names import ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.pool_admin.nested import PoolSizes
from tests.support.fake_engine import settle
from tests.support.pool_services import (
    MOE_LAYERS,
    NUM_EXPERTS,
    ServiceUnderTest,
    service_of,
    service_over,
)
from tests.unit.server.pool_admin.test_sizes import scored

OTHER_BEST = (5, 3, 1, 6, 4, 2, 0, 7)


def sizes_of(*pools: ExpertPool) -> tuple[PoolSizes, PoolCatalog]:
    catalog = PoolCatalog((), MOE_LAYERS)
    for pool in pools:
        catalog.add(pool)
    return PoolSizes(catalog), catalog


def elastic(min_experts: int | None) -> ServiceUnderTest:
    """Return a service of pool `sums`, the experts 0, 2, 4, 6 and the shared 7, best first."""
    service = service_of()
    service.catalog.add(scored("sums", 0, 2, 4, 6))
    names, base = ModelNames(("emo",), "base"), service.lookup.base_pool
    return service_over(names, base, service.catalog, service.manager, min_experts=min_experts)


@pytest.mark.parametrize(
    ("name", "least", "expected"),
    [("sums", 2, range(2, 5)), ("sums", 4, range(4, 5)), ("sums@3", 1, range(1, 3))],
)
def test_every_size_that_is_part_of_the_pool(name: str, least: int, expected: range) -> None:
    sizes, catalog = sizes_of(scored("sums", 0, 2, 4, 6))
    found = sizes.of(catalog.resolve(name), least)
    assert found is not None and found.sizes == expected and found.whole.name == name
    assert found.at(2).name == "sums@2" and found.at(2).expert_ids[1] == (0, 7)


def test_a_file_that_lists_others_than_its_best_has_the_sizes_that_are_in_it() -> None:
    sizes, catalog = sizes_of(scored("odd", 0, 2, 3, 5))
    found = sizes.of(catalog.pools["odd"], 1)
    assert found is not None and found.sizes == range(1, 4)
    sizes, catalog = sizes_of(scored("worst", 5, 3, 1))
    assert sizes.of(catalog.pools["worst"], 2) is None


def test_no_sizes_where_there_are_none() -> None:
    sums = scored("sums", 0, 2, 4, 6)
    layer = LayerExperts((0, 1))
    sizes, catalog = sizes_of(sums, ExpertPool("bare", (None, layer, layer)))
    for name, least in (("bare", 1), ("sums", 5), ("bare+sums", 1), ("sums@1", 1)):
        assert sizes.of(catalog.resolve(name), least) is None
    assert sizes.of(ExpertPool.base(MOE_LAYERS), 1) is None


def test_an_old_definition_has_none_and_a_new_one_its_own() -> None:
    sizes, catalog = sizes_of(scored("sums", 0, 2, 4, 6))
    old = catalog.pools["sums"]
    assert sizes.of(old, 2) is not None
    catalog.add(scored("sums", 5, 3, 1, best=OTHER_BEST), replace=True)
    assert sizes.of(old, 2) is None
    found = sizes.of(catalog.pools["sums"], 2)
    assert found is not None and found.at(2).expert_ids[1] == (5, 7)
    catalog.remove("sums")
    assert sizes.of(old, 2) is None
    with pytest.raises(UnknownPool):
        found.at(2)


@pytest.mark.parametrize(
    ("operator", "client", "expected"),
    [
        (None, None, "sums"),
        (2, None, "sums@2"),
        (2, 3, "sums@3"),
        (2, 0, "sums"),
        (None, 3, "sums@3"),
        (9, None, "sums"),
    ],
)
async def test_the_client_may_ask_for_other_than_the_operators_least(
    operator: int | None, client: int | None, expected: str
) -> None:
    service = elastic(operator)
    assert service.residency.admit("sums", least=client).name == expected


async def test_a_request_keeps_its_size_though_more_has_come() -> None:
    service = elastic(2)
    begun: dict[str, str] = {}
    async with service.residency.lease(service.residency.admit("sums", begun=begun)) as lease:
        assert lease.pool.name == "sums@2"
    await settle()
    assert service.manager.is_resident(service.lookup.find("sums"))
    assert service.residency.admit("sums", begun=begun).name == "sums@2"
    assert service.residency.admit("sums", begun={}).name == "sums"
    assert begun == {"sums": "sums@2"}


async def test_operators_load_whole_pools_and_every_expert_of_the_slab_can_be_used() -> None:
    service = elastic(2)
    await service.residency.load("sums")
    assert service.manager.statistics().used_slots == 2 * 5
    assert service.residency.admit("emo").name == "base" and NUM_EXPERTS == 8
