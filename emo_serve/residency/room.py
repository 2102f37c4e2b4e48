"""Room for one more pool: expert slots, rows of the pool table, and who must go for another.

Decisions here are pure questions of sets and counts; nothing waits and nothing is copied. A pool in
use has slots (see SlotTable) and a row, by which the engine knows it. Row 0 is the base pool's; the
others are handed out lowest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from emo_serve.errors import ConfigError, PoolTooLarge
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.slots import LoadPlan, SlotTable

__all__ = ["Room"]

_BASE_ROW = 0


class Room:
    """Account for slots and rows together; pools go by their content hash.

    `num_rows` counts the base pool's row too; `slot_bytes` is the size of one expert of one layer,
    over all ranks.
    """

    def __init__(self, slots: SlotTable, num_rows: int, slot_bytes: int) -> None:
        if num_rows < 1:
            raise ConfigError(f"rows of the pool table: {num_rows}; expected at least 1")
        self.slots = slots
        self.num_rows = num_rows
        self.slot_bytes = slot_bytes
        self._base_ids = tuple(tuple(range(count)) for count in slots.experts_per_layer)
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(_BASE_ROW + 1, num_rows))  # a heap

    # -- questions --

    @property
    def num_free_rows(self) -> int:
        """Return the rows that no pool has, the base pool's not counted."""
        return len(self._free_rows)

    def row_of(self, key: str) -> int:
        """Return the row of a pool that was given room."""
        return self._row_of[key]

    def fits(self, *pools: ExpertPool, without: Collection[str] = ()) -> bool:
        """Tell whether there is room for all of these beside what is there, but for `without`."""
        rows = sum(not self._is_base(pool) for pool in pools)
        given_up = sum(self._row_of[key] != _BASE_ROW for key in without)
        if self.num_free_rows + given_up < rows:
            return False
        return self.slots.fits(*(pool.expert_ids for pool in pools), without=without)

    def choose(self, pool: ExpertPool, candidates: Sequence[str]) -> list[str] | None:
        """Return which of the candidates, asked in this order, must go so that the pool fits.

        None means that all of them going would not be enough.
        """
        if not self.fits(pool, without=candidates):
            return None
        victims: list[str] = []
        for key in candidates:
            if self.fits(pool, without=victims):
                break
            victims.append(key)
        for key in reversed(victims):  # what a later choice made unnecessary may stay
            fewer = [victim for victim in victims if victim != key]
            if self.fits(pool, without=fewer):
                victims = fewer
        return victims

    def check_can_ever_fit(self, pool: ExpertPool) -> None:
        """Raise PoolTooLarge for a pool that the empty slab could not hold."""
        needs = self.slots.needs(pool.expert_ids)
        worst = max(needs, key=lambda need: need.needed - need.slots, default=None)
        if worst is None or worst.needed <= worst.slots:
            return
        experts, slots = sum(map(len, pool.expert_ids)), sum(need.slots for need in needs)
        raise PoolTooLarge(
            f"pool {pool.name!r} can never be resident: layer {worst.layer} needs {worst.needed}"
            f" slots and has {worst.slots}; its {experts} experts take {self._gib(experts)}, the"
            f" slab holds {slots}, {self._gib(slots)}; raise --expert-memory or --expert-slots to"
            f" serve it"
        )

    # -- changes --

    def plan(self, pool: ExpertPool, victims: Sequence[str]) -> LoadPlan:
        """Plan the pool's load in the place of the victims; changes nothing."""
        return self.slots.plan_load(pool.content_hash, pool.expert_ids, victims)

    def take(self, pool: ExpertPool, plan: LoadPlan) -> int:
        """Evict the plan's victims, take its slots and a row, and return that."""
        self.slots.begin(plan)
        for key in plan.evictions:
            self._free_row(key)
        row = _BASE_ROW if self._is_base(pool) else heapq.heappop(self._free_rows)
        self._row_of[plan.key] = row
        return row

    def settle(self, key: str, *, is_loaded: bool) -> None:
        """End a load: its experts are resident, or slots and row go back."""
        if is_loaded:
            self.slots.finish(key)
        else:
            self.slots.abandon(key)
            self._free_row(key)

    def evict(self, key: str) -> None:
        """Give back a resident pool's slots, as far as no other pool needs them, and its row."""
        self.slots.evict(key)
        self._free_row(key)

    def check_integrity(self) -> None:
        """Assert that slots and rows are those of the same pools, each row of one."""
        self.slots.check_integrity()
        assert self.slots.keys == self._row_of.keys()
        assert len(set(self._row_of.values())) == len(self._row_of)
        taken = [row for row in self._row_of.values() if row != _BASE_ROW]
        assert sorted(taken + self._free_rows) == list(range(_BASE_ROW + 1, self.num_rows))

    def _free_row(self, key: str) -> None:
        row = self._row_of.pop(key)
        if row != _BASE_ROW:
            heapq.heappush(self._free_rows, row)

    def _is_base(self, pool: ExpertPool) -> bool:
        return pool.expert_ids == self._base_ids and pool.router_temperature == 1.0

    def _gib(self, slots: int) -> str:
        return f"{slots * self.slot_bytes / 2**30:.3g} GiB"
