"""A small model's pools and a service over a fake engine, for tests that need no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emo_serve.facts import MoeLayer
from emo_serve.names import ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.backlog import BacklogLimits
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.ports import NullObserver
from emo_serve.residency.slots import SlotTable
from emo_serve.server.pool_admin.activity import PoolActivity
from emo_serve.server.pool_admin.service import PoolService
from tests.support.fake_engine import SLOT_BYTES, FakeEngine

NUM_EXPERTS = 8
NOW = 1_700_000_000
MOE_LAYERS = (None, *[MoeLayer(NUM_EXPERTS, 1, (), 3)] * 2)  # a dense layer, two MoE layers
EXPERTS_PER_LAYER = (0, NUM_EXPERTS, NUM_EXPERTS)


def pool(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    """Return a pool of the same experts in both MoE layers, completed."""
    layer = LayerExperts(experts)
    made = ExpertPool(name, (None, layer, layer), router_temperature=temperature)
    return made.complete(MOE_LAYERS)


POOLS = (
    pool("math", 0, 1),
    pool("code", 2, 3),
    pool("law", 4, 5, 6),
    pool("hot", 6, temperature=2),
)


@dataclass(frozen=True)
class ServiceUnderTest(PoolService):
    """A service whose manager and catalog a test may look at."""

    manager: ResidencyManager
    catalog: PoolCatalog
    activity: PoolActivity | None = None


def service_over(
    names: ModelNames,
    base: ExpertPool,
    catalog: PoolCatalog,
    manager: ResidencyManager,
    **options: Any,
) -> ServiceUnderTest:
    """Return a service over these, as `PoolService.over` builds it."""
    parts = PoolService.over(names, base, catalog, manager, **options)
    activity = options.get("activity")
    return ServiceUnderTest(**vars(parts), manager=manager, catalog=catalog, activity=activity)


def service_of(
    engine: FakeEngine | None = None,
    *,
    slots: int = NUM_EXPERTS,
    rows: int = 6,
    default_pool: str = "base",
    limits: BacklogLimits | None = None,
    pools: Sequence[ExpertPool] = POOLS,
    **options: Any,
) -> ServiceUnderTest:
    """Return a service of the model `emo` with these pools, none loaded yet.

    Clients' requests are remembered as of the second NOW.
    """
    activity = PoolActivity(NullObserver(), lambda: NOW)
    manager = ResidencyManager(
        SlotTable(EXPERTS_PER_LAYER, slots),
        rows,
        engine or FakeEngine(),
        slot_bytes=SLOT_BYTES,
        limits=limits,
        observer=activity,
    )
    names = ModelNames(("emo",), default_pool)
    base = ExpertPool.base(MOE_LAYERS)
    return service_over(
        names, base, PoolCatalog(pools, MOE_LAYERS), manager, activity=activity, **options
    )
