"""Which model names this server answers soonest, for routers in front of several servers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice

from emo_serve.names import is_derived
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.statistics import PoolResidency
from emo_serve.router_metrics import PoolsAtHand
from emo_serve.server.pool_admin.lookup import PoolLookup

__all__ = ["pools_at_hand"]

_MANY = 64  # pools that would fit; routers only ask whether one more does


def pools_at_hand(lookup: PoolLookup, manager: ResidencyManager) -> PoolsAtHand:
    """Return the resident and the awaited pools under every name that clients may use.

    A pool counts as resident if a request for it would run at once, so a closing pool does not.
    Sizes and unions count while they have room or are waited for. Of the absent pools the
    first _MANY are asked whether they fit.
    """
    held = {entry.content_hash: entry for entry in manager.statistics().pools}
    pools = [*lookup.pools, *_derived(lookup, held.values())]
    resident = [pool for pool in pools if manager.would_hit(pool)]
    here = {pool.content_hash for pool in resident}
    awaited = [
        pool
        for pool in pools
        if pool.content_hash not in here and _is_awaited(held.get(pool.content_hash))
    ]
    absent = [pool for pool in lookup.pools if pool.content_hash not in here | held.keys()]
    num_awaited = manager.num_fitting(awaited)
    num_more = manager.num_fitting([*awaited, *islice(absent, _MANY)]) - num_awaited
    return PoolsAtHand(_names(lookup, resident), _names(lookup, awaited), num_more)


def _derived(lookup: PoolLookup, entries: Iterable[PoolResidency]) -> list[ExpertPool]:
    """Return the sizes and unions that have room or are waited for, as they are defined now."""
    hashes = {
        name: entry.content_hash
        for entry in entries
        for name in (entry.name, *entry.running_by_name, *entry.waiting_by_name)
        if is_derived(name)
    }
    known = ((lookup.known(name), content_hash) for name, content_hash in sorted(hashes.items()))
    return [pool for pool, key in known if pool is not None and pool.content_hash == key]


def _is_awaited(entry: PoolResidency | None) -> bool:
    if entry is None:
        return False
    return entry.state in ("loading", "waiting") or entry.waiting_requests > 0


def _names(lookup: PoolLookup, pools: Sequence[ExpertPool]) -> tuple[str, ...]:
    spelled = (lookup.names.spellings(pool.name) for pool in pools)
    return tuple(dict.fromkeys(chain.from_iterable(spelled)))
