"""Pools at the router temperatures that clients ask for, within the operator's bound.

A temperature decides the output, so it is part of a pool's content hash: at another one, a pool has
a row and prefix-cache entries of its own, and shares every slot.
"""

from __future__ import annotations

from dataclasses import replace

from cachetools import LRUCache

from emo_serve.errors import RequestError
from emo_serve.pools.pool import ExpertPool

__all__ = ["RouterTemperatures"]

_MAX_REMEMBERED = 1024


class RouterTemperatures:
    """Make pools that route at other temperatures than their own.

    `bounds` are the lowest and the highest that may be asked for; with None, none may.
    """

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self._bounds = bounds
        self._made: LRUCache[tuple[str, str, float], ExpertPool] = LRUCache(_MAX_REMEMBERED)

    def pool_at(self, pool: ExpertPool, temperature: float) -> ExpertPool:
        """Return a pool's experts, and its name, at a temperature; raises RequestError."""
        if self._bounds is None:
            raise RequestError(
                f"the request asks for router temperature {temperature:g}, and this server routes"
                " at the pools' own; leave x-emo-router-temperature out, or start the server with"
                " --router-temperatures LOW,HIGH"
            )
        low, high = self._bounds
        if not low <= temperature <= high:
            raise RequestError(
                f"the request asks for router temperature {temperature:g}; this server takes"
                f" {low:g} to {high:g} (--router-temperatures)"
            )
        if temperature == pool.router_temperature:
            return pool
        key = (pool.name, pool.content_hash, temperature)
        if key not in self._made:
            self._made[key] = replace(pool, router_temperature=temperature)
        made: ExpertPool = self._made[key]
        return made
