"""Which model names this server answers soonest, for routers in front of several servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from emo_serve.names import is_derived
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.statistics import PoolResidency
from emo_serve.router_metrics import PoolsAtHand
from emo_serve.server.pool_admin.lookup import PoolLookup

__all__ = ["AtHand", "at_hand", "pools_at_hand"]

_MANY = 64  # pools that would fit; routers only ask whether one more does


@dataclass(frozen=True)
class AtHand:
    """Pools, sizes and unions as requests would find them now.

    Those in `resident` would run at once, those in `awaited` are loading or waited for, and
    `absent` has at most _MANY of the other pools.
    """

    resident: tuple[ExpertPool, ...]
    awaited: tuple[ExpertPool, ...]
    absent: tuple[ExpertPool, ...]


def at_hand(lookup: PoolLookup, manager: ResidencyManager) -> AtHand:
    """Sort the pools, and the sizes and unions that are in use, by how soon they can be used.

    A pool counts as resident if a request for it would run at once, so a closing pool does not.
    """
    held = {entry.content_hash: entry for entry in manager.statistics().pools}
    pools = [*lookup.pools, *_derived(lookup, held)]
    resident = [pool for pool in pools if manager.would_hit(pool)]
    here = {pool.content_hash for pool in resident}
    awaited = [
        pool
        for pool in pools
        if pool.content_hash not in here and _is_awaited(held.get(pool.content_hash))
    ]
    absent = (pool for pool in lookup.pools if pool.content_hash not in here | held.keys())
    return AtHand(tuple(resident), tuple(awaited), tuple(islice(absent, _MANY)))


def pools_at_hand(lookup: PoolLookup, manager: ResidencyManager) -> PoolsAtHand:
    """Return the resident and the awaited pools under every name that clients may use.

    Sizes and unions count while they have room or are waited for. Of the absent pools the
    first _MANY are asked whether they fit.
    """
    found = at_hand(lookup, manager)
    num_awaited = manager.num_fitting(found.awaited)
    num_more = manager.num_fitting([*found.awaited, *found.absent]) - num_awaited
    return PoolsAtHand(_names(lookup, found.resident), _names(lookup, found.awaited), num_more)


def _derived(lookup: PoolLookup, held: Mapping[str, PoolResidency]) -> list[ExpertPool]:
    """Return the sizes and unions that have room or are waited for, as they are defined now."""
    names = {name for entry in held.values() for name in entry.names if is_derived(name)}
    known = map(lookup.known, sorted(names))
    return [pool for pool in known if pool is not None and pool.content_hash in held]


def _is_awaited(entry: PoolResidency | None) -> bool:
    if entry is None:
        return False
    return entry.state in ("loading", "waiting") or entry.waiting_requests > 0


def _names(lookup: PoolLookup, pools: Sequence[ExpertPool]) -> tuple[str, ...]:
    spelled = (lookup.names.spellings(pool.name) for pool in pools)
    return tuple(dict.fromkeys(chain.from_iterable(spelled)))
