"""What a router in front of several servers reads: the pools a server has at hand, and its load.

Kubernetes routers, such as the endpoint picker of the Gateway API inference extension and llm-d's,
know LoRA adapters, not pools. They read one series of vLLM's,

    vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c"}

and prefer a server that has the model's name in one of the lists; next, one whose lists are shorter
than `max_lora`. To them a resident pool is a running adapter, and a pool that is loading or waited
for is a waiting one. The value is the time of the scrape, because readers take the newest series.
A series with two empty lists would be skipped, and the lists read before it would count on: hence a
name that no client can use stands there while a server has no pool at all.

vLLM shows the series only with LoRA enabled, which emo-serve refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

__all__ = ["NO_POOL", "ROUTER_METRICS", "PoolsAtHand", "pools_family"]

ROUTER_METRICS = (
    "vllm:cache_config_info",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits",
    "vllm:prefix_cache_queries",
)
"""The families of vLLM's that routers read beside the series of pools."""

NO_POOL = "(none)"
"""What stands in the list while no pool is resident and none is waited for."""

_NAME = "vllm:lora_requests_info"
_HELP = "Pools as LoRA adapters, for routers: names, and how many of them fit without eviction"
_SEPARATOR = ","


@dataclass(frozen=True)
class PoolsAtHand:
    """Which names a server answers soonest.

    `resident` and `awaited` are all names by which clients ask for the pools that are resident,
    and for those that are loading or waited for. `num_more` is how many further pools would fit
    beside all of them, with no eviction.
    """

    resident: tuple[str, ...]
    awaited: tuple[str, ...]
    num_more: int


def pools_family(pools: PoolsAtHand, now: float) -> Metric:
    """Return the series that routers read; `now` is the time in seconds since 1970.

    Names with a comma are left out, because the lists have no way to write them.
    """
    resident, awaited = _listed(pools.resident), _listed(pools.awaited)
    if not (resident or awaited):
        resident = [NO_POOL]
    most = len(resident) + len(awaited) + pools.num_more
    family = GaugeMetricFamily(
        _NAME,
        _HELP,
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    family.add_metric([str(most), _SEPARATOR.join(resident), _SEPARATOR.join(awaited)], now)
    return family


def _listed(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if _SEPARATOR not in name]
