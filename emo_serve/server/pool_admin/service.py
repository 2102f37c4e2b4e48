"""Everything the HTTP side may do with pools: names, residency, definitions and status.

Routes and the generation hook use neither the catalog nor the manager directly, and tests of both
need no vLLM.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from emo_serve.metrics import PoolMetrics
from emo_serve.names import ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.ports import NullObserver
from emo_serve.server.pool_admin.activity import PoolActivity
from emo_serve.server.pool_admin.definitions import PoolDefinitions
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.pool_admin.nested import PoolSizes
from emo_serve.server.pool_admin.residency import NamedResidency
from emo_serve.server.pool_admin.status import PoolStatuses
from emo_serve.server.pool_admin.temperatures import RouterTemperatures
from emo_serve.server.pool_admin.temporary import TemporaryPools
from emo_serve.vllm_plugin.contract import PoolUsage

__all__ = ["PoolService"]


@dataclass(frozen=True)
class PoolService:
    """The parts, one per file of this package."""

    lookup: PoolLookup
    residency: NamedResidency
    definitions: PoolDefinitions
    statuses: PoolStatuses
    temporary: TemporaryPools

    @classmethod
    def over(
        cls,
        names: ModelNames,
        base_pool: ExpertPool,
        catalog: PoolCatalog,
        manager: ResidencyManager,
        metrics: PoolMetrics | None = None,
        usage_of: Callable[[ExpertPool], Awaitable[PoolUsage]] | None = None,
        activity: PoolActivity | None = None,
        min_experts: int | None = None,
        router_temperatures: tuple[float, float] | None = None,
    ) -> PoolService:
        """Build the parts over one catalog and one manager.

        `usage_of` asks the engine what a pool's content has used; None if no routing is recorded.
        `activity` observes the manager; without it, pools look as if no client had used them.
        `min_experts` makes pools elastic: so many experts per layer may serve in a pool's stead.
        `router_temperatures` are the lowest and highest that clients may route at; None: no other
        than the pool's.
        Raises ConfigError for pools named like the model, and UnknownPool for the default pool.
        """
        lookup = PoolLookup(names, base_pool, catalog)
        temporary = TemporaryPools(lookup, manager)
        activity = activity or PoolActivity(NullObserver())
        statuses = PoolStatuses(lookup, catalog, manager, usage_of, activity)
        residency = NamedResidency(
            lookup,
            manager,
            statuses,
            PoolSizes(catalog),
            RouterTemperatures(router_temperatures),
            min_experts,
        )
        return cls(
            lookup,
            residency,
            PoolDefinitions(lookup, catalog, manager, residency, temporary, statuses, metrics),
            statuses,
            temporary,
        )
