"""Room for one more pool: expert slots, rows of the pool table, and who must go for another.

Decisions here are pure questions of sets and counts; nothing waits and nothing is copied. A pool in
use has slots (see SlotTable) and a row, by which the engine knows it. Row 0 is the base pool's; the
others are handed out lowest first. The line asks on every request, for every place and over every
pool, so what a pool takes is worked out once, as a `Demand`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from emo_serve.errors import ConfigError, PoolTooLarge
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.slots import Copy, ExpertIds, LoadPlan, SlotTable

__all__ = ["Demand", "Room"]

_BASE_ROW = 0
_REMEMBERED_DEMANDS = 4096  # pools; unions make their number the clients' choice


@dataclass(frozen=True, slots=True)
class Demand:
    """What pools take together: experts, as the slot table's bits, and rows but for row 0."""

    experts: int
    rows: int

    def __or__(self, other: Demand) -> Demand:
        """Return what both take: experts are shared, rows are not."""
        return Demand(self.experts | other.experts, self.rows + other.rows)


class Room:
    """Account for slots and rows together; pools go by their content hash.

    `num_rows` counts the base pool's row too; `slot_bytes` is the size of one expert of one layer,
    over all ranks. With `may_stream`, a pool that the empty slab could not hold takes a row and no
    slots: its experts pass through others, which are not accounted for here.
    """

    def __init__(
        self, slots: SlotTable, num_rows: int, slot_bytes: int, *, may_stream: bool = False
    ) -> None:
        if num_rows < 1:
            raise ConfigError(f"rows of the pool table: {num_rows}; expected at least 1")
        self.slots = slots
        self.num_rows = num_rows
        self.slot_bytes = slot_bytes
        self._may_stream = may_stream
        self._base_ids = tuple(tuple(range(count)) for count in slots.experts_per_layer)
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(_BASE_ROW + 1, num_rows))  # a heap
        self._demands: dict[str, Demand] = {}

    # -- questions --

    @property
    def num_free_rows(self) -> int:
        """Return the rows that no pool has, the base pool's not counted."""
        return len(self._free_rows)

    def row_of(self, key: str) -> int:
        """Return the row of a pool that was given room."""
        return self._row_of[key]

    def demand(self, pool: ExpertPool) -> Demand:
        """Return what a pool takes."""
        demand = self._demands.get(pool.content_hash)
        if demand is None:
            demand = Demand(self.slots.bits(self._held(pool)), not self._is_base(pool))
            if len(self._demands) == _REMEMBERED_DEMANDS:
                self._demands.clear()
            self._demands[pool.content_hash] = demand
        return demand

    def is_streamed(self, pool: ExpertPool) -> bool:
        """Tell whether a pool's experts pass through slots kept for that, and hold none."""
        return self._may_stream and not self.slots.could_hold(pool.expert_ids)

    def streamed_copies(self, pool: ExpertPool) -> list[Copy]:
        """Return what requests of a streamed pool may have read; the slots mean nothing."""
        layers = enumerate(pool.expert_ids)
        return [Copy(layer, expert, 0) for layer, experts in layers for expert in experts]

    def covers(self, pool: ExpertPool) -> bool:
        """Tell whether every expert that a pool must have in slots is resident."""
        return self.slots.covers_bits(self.demand(pool).experts)

    def kept(self, without: Collection[str] = ()) -> Demand:
        """Return what all pools but these take."""
        return self._taken_by([key for key in self._row_of if key not in without])

    def can_hold(self, demand: Demand) -> bool:
        """Tell whether slots and rows, but for this demand unused, are enough for it."""
        return demand.rows < self.num_rows and self.slots.can_hold(demand.experts)

    def fits(self, wanted: Demand, without: Collection[str] = ()) -> bool:
        """Tell whether there is room for this beside what is there, but for `without`."""
        return self.can_hold(self.kept(without) | wanted)

    def num_fitting(self, pools: Iterable[ExpertPool]) -> int:
        """Return how many of these pools, taken in turn, fit together beside what is there.

        Pools that are there themselves are not counted.
        """
        taken, count, seen = self.kept(), 0, set(self._row_of)
        for pool in pools:
            if pool.content_hash not in seen:
                seen.add(pool.content_hash)
                with_it = taken | self.demand(pool)
                if self.can_hold(with_it):
                    taken, count = with_it, count + 1
        return count

    def choose(self, wanted: Demand, candidates: Sequence[str]) -> list[str] | None:
        """Return which of the candidates, the first to go first, must go so that `wanted` fits.

        From the last on, every one stays that may, so none goes in vain. None means that all of
        them going would not be enough.
        """
        stay = self.kept(set(candidates)) | wanted
        if not self.can_hold(stay):
            return None
        victims: list[str] = []
        for key in reversed(candidates):
            with_it = stay | self._taken_by((key,))
            if self.can_hold(with_it):
                stay = with_it
            else:
                victims.append(key)
        return victims[::-1]

    def check_can_ever_fit(self, pool: ExpertPool) -> None:
        """Raise PoolTooLarge for a pool that the empty slab could not hold."""
        needs = self.slots.needs(pool.expert_ids)
        worst = max(needs, key=lambda need: need.needed - need.slots, default=None)
        if worst is None or worst.needed <= worst.slots:
            return
        smaller = f", or ask for {pool.name_at(worst.slots)!r}" if pool.has_scores else ""
        experts, slots = sum(map(len, pool.expert_ids)), sum(need.slots for need in needs)
        raise PoolTooLarge(
            f"pool {pool.name!r} can never be resident: layer {worst.layer} needs {worst.needed}"
            f" slots and has {worst.slots}; its {experts} experts take {self._gib(experts)}, the"
            f" slab holds {slots}, {self._gib(slots)}; raise --expert-memory or --expert-slots to"
            f" serve it{smaller}"
        )

    # -- changes --

    def plan(self, pool: ExpertPool, victims: Sequence[str]) -> LoadPlan:
        """Plan the pool's load in the place of the victims; changes nothing."""
        return self.slots.plan_load(pool.content_hash, self._held(pool), victims)

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

    def _held(self, pool: ExpertPool) -> ExpertIds:
        """Return the experts that a pool has in slots while it is in use."""
        return ((),) * len(pool.expert_ids) if self.is_streamed(pool) else pool.expert_ids

    def _taken_by(self, keys: Sequence[str]) -> Demand:
        rows = sum(self._row_of[key] != _BASE_ROW for key in keys)
        return Demand(self.slots.held_by(keys), rows)

    def _free_row(self, key: str) -> None:
        row = self._row_of.pop(key)
        if row != _BASE_ROW:
            heapq.heappush(self._free_rows, row)

    def _is_base(self, pool: ExpertPool) -> bool:
        return pool.expert_ids == self._base_ids and pool.router_temperature == 1.0

    def _gib(self, slots: int) -> str:
        return f"{slots * self.slot_bytes / 2**30:.3g} GiB"
