"""The pools that have room: their leases and pins, and which of them must be evicted.

Here a pool counts as resident from the moment its load is given slots and a row until it is
evicted. All changes of the room go through this module, so that the two accounts cannot disagree.
Nothing here waits, and nothing here decides which pool makes room for another.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping

from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.ports import ResidencyObserver
from emo_serve.residency.records import ResidentPool
from emo_serve.residency.room import Room
from emo_serve.residency.slots import LoadPlan

__all__ = ["ResidentPools"]

logger = logging.getLogger(__name__)

_REMEMBERED_RETIRED = 4096  # definitions; their stragglers ask within a moment


class ResidentPools:
    """Own the resident pools with their leases, pins and drains; iterate over them, oldest first.

    Pools go by their content hash.
    """

    def __init__(self, room: Room, observer: ResidencyObserver) -> None:
        self._room = room
        self._observer = observer
        self._pools: dict[str, ResidentPool] = {}
        self._pinned: set[str] = set()
        self._retired = _RetiredKeys(_REMEMBERED_RETIRED)

    # -- questions --

    def __iter__(self) -> Iterator[ResidentPool]:
        return iter(self._pools.values())

    def __contains__(self, key: str) -> bool:
        return key in self._pools

    def get(self, key: str) -> ResidentPool | None:
        """Return a pool that has room, open or not; None for any other."""
        return self._pools.get(key)

    def get_open(self, key: str) -> ResidentPool | None:
        """Return the pool if a lease on it can be had at once, else None."""
        resident = self._pools.get(key)
        return resident if resident is not None and resident.is_open else None

    def is_pinned(self, key: str) -> bool:
        """Tell whether an operator wants the pool to stay."""
        return key in self._pinned

    @property
    def pinned_names(self) -> list[str]:
        """Return the names of the pinned pools, in order."""
        return sorted(self._pools[key].pool.name for key in self._pinned)

    @property
    def unpinned(self) -> frozenset[str]:
        """Return the keys of all pools that are not pinned, loading ones included."""
        return frozenset(self._pools.keys() - self._pinned)

    @property
    def evictable(self) -> list[ResidentPool]:
        """Return the pools that may be evicted for another, once no lease holds them."""
        return [one for one in self if one.is_published and one.key not in self._pinned]

    @property
    def num_leases(self) -> int:
        """Return the leases held, of all pools."""
        return sum(resident.leases for resident in self)

    # -- room --

    def begin(self, pool: ExpertPool, plan: LoadPlan, staying: Mapping[str, str]) -> ResidentPool:
        """Evict the plan's victims, and take slots and a row for a pool that will be loaded.

        `staying` names, by victim, the size of it that stays.
        """
        row = self._room.take(pool, plan)
        for victim in plan.evictions:
            size = staying.get(victim)
            self._note_eviction(self._drop(victim), "shrunk" if size else "room", size)
        resident = ResidentPool(pool, row, is_retired=plan.key in self._retired)
        self._pools[plan.key] = resident
        return resident

    def publish(self, resident: ResidentPool) -> None:
        """Count a pool's experts as resident: its load has ended well."""
        self._room.settle(resident.key, is_loaded=True)
        resident.is_published = True

    def abandon(self, resident: ResidentPool) -> None:
        """Give back the slots and the row of a pool whose load has failed."""
        self._room.settle(resident.key, is_loaded=False)
        self._drop(resident.key)

    def evict_leaving(self) -> bool:
        """Evict the retired and drained pools that no lease holds; tell whether there were any."""
        leaving = [resident for resident in self if resident.is_leaving]
        for resident in leaving:
            self._room.evict(resident.key)
            self._drop(resident.key)
            self._note_eviction(resident, "operator" if resident.drains else "retired")
        return bool(leaving)

    def _drop(self, key: str) -> ResidentPool:
        resident = self._pools.pop(key)
        resident.gone.set()
        return resident

    def _note_eviction(
        self, resident: ResidentPool, reason: str, staying: str | None = None
    ) -> None:
        self._observer.count_eviction(resident.pool.name, reason)
        rest = f", {staying} stays" if staying else ""
        logger.info("evicted pool %s (%s%s)", resident.pool.name, reason, rest)

    # -- leases, pins and drains --

    def add_lease(self, resident: ResidentPool, name: str) -> None:
        """Keep a pool in place for one more request, which asked for it by `name`."""
        resident.leases_by_name[name] += 1

    def end_lease(self, resident: ResidentPool, name: str) -> None:
        """End a request's hold on a pool."""
        resident.leases_by_name[name] -= 1
        if not resident.leases_by_name[name]:
            del resident.leases_by_name[name]

    def pin(self, resident: ResidentPool) -> None:
        """Have a pool stay, and open it if it is closing; retired pools cannot be pinned."""
        assert not resident.is_retired, "a pool without a definition could never be unpinned"
        self._pinned.add(resident.key)
        resident.is_closing = False

    def unpin(self, key: str) -> None:
        """Let a pool be evicted like any other; a no-op for one that is not pinned."""
        self._pinned.discard(key)

    def start_drain(self, resident: ResidentPool) -> None:
        """Admit no new requests to a pool, so that it goes after its last lease."""
        resident.drains += 1

    def end_drain(self, resident: ResidentPool) -> None:
        """End one operator's drain; the pool is open again after the last."""
        resident.drains -= 1

    # -- closing --

    def close_only(self, keys: Collection[str]) -> bool:
        """Close these pools to new requests and open all others; tell whether any opened."""
        opened = [resident for resident in self if resident.is_closing and resident.key not in keys]
        for resident in self:
            resident.is_closing = resident.key in keys
        return bool(opened)

    def reopen(self, key: str) -> None:
        """Open a pool that was closing; a no-op for any other."""
        if (resident := self._pools.get(key)) is not None:
            resident.is_closing = False

    # -- definitions --

    def retire(self, key: str) -> None:
        """Unpin a pool whose definition is gone, and let it go after its last lease.

        If it is loaded again, for requests admitted before, it goes after these, too.
        """
        self.unpin(key)
        self._retired.add(key)
        if (resident := self._pools.get(key)) is not None:
            resident.is_retired = True

    def revive(self, key: str) -> bool:
        """Let a pool stay that is defined again; tell whether one was about to go."""
        self._retired.discard(key)
        resident = self._pools.get(key)
        if resident is None or not resident.is_retired:
            return False
        resident.is_retired = False
        return True

    # -- self-check --

    def check_integrity(self) -> None:
        """Assert that slots, rows, leases and pins agree."""
        self._room.check_integrity()
        assert self._room.slots.keys == self._pools.keys()
        assert self._pinned <= self._pools.keys()
        for key, resident in self._pools.items():
            is_pinned = key in self._pinned
            assert key == resident.key
            assert resident.row == self._room.row_of(key)
            assert min(resident.leases_by_name.values(), default=1) > 0 and resident.drains >= 0
            assert resident.is_published or not (resident.leases or is_pinned)
            assert not (is_pinned and (resident.is_retired or resident.is_closing))


class _RetiredKeys:
    """Remember which definitions are gone; beyond `limit`, forget the oldest.

    An OrderedDict is enough: the order is that of retirement, not of use, and residency needs the
    standard library only.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: OrderedDict[str, None] = OrderedDict()  # the oldest first

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        self._keys[key] = None
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def discard(self, key: str) -> None:
        self._keys.pop(key, None)
