"""Leases on resident pools. The one authority, in the front-end process, on who may use which row.

A pool in use has a row of the engine's pool table (which experts, which temperature) and
references in the SlotTable. Row 0 is the base pool's. `load` brings a pool in for good. Any other
pool whose experts all happen to be resident, a union above all, costs nothing but a row: it is
published at its first lease, and keeps the row until another such pool needs one and no lease holds
it.

Copies and publications run in tasks of the manager's own, so that a client that goes away while it
waits neither interrupts nor repeats them. Everything here belongs to one event loop; between two
awaits the tables are always consistent, and giving a lease back never awaits.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from emo_serve.errors import ConfigError, Draining, NoFreePoolRow, PoolNotResident, PoolTooLarge
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.slots import Copy, ExpertIds, LayerSlots, LoadPlan, SlotTable

__all__ = [
    "Lease",
    "LoadReport",
    "PoolEngine",
    "PoolResidency",
    "ResidencyManager",
    "ResidencyStats",
]

logger = logging.getLogger(__name__)

_BASE_ROW = 0


@dataclass(frozen=True)
class LoadReport:
    """What a list of copies cost the engine; the largest figure of its ranks."""

    bytes_read: int
    seconds: float


class PoolEngine(Protocol):
    """What the manager asks of the engine's workers; whatever these raise reaches the caller."""

    async def load_experts(self, copies: Sequence[Copy]) -> LoadReport:
        """Copy experts into slots that no published row refers to; return when they are there."""
        ...

    async def publish_pool(self, row: int, expert_ids: ExpertIds, temperature: float) -> None:
        """Make one row of the pool table stand for these experts, in every rank."""
        ...


@dataclass(frozen=True)
class Lease:
    """A running request's hold on a pool: until it ends, row and slots stay what they are."""

    row: int
    pool: ExpertPool


@dataclass(frozen=True)
class PoolResidency:
    """One pool that has a row; `is_kept` tells a loaded one from one that merely fits.

    Pools of equal content share a row and go by the name first used: look up by `content_hash`.
    """

    name: str
    content_hash: str
    row: int
    is_kept: bool
    is_published: bool
    running_requests: int


@dataclass(frozen=True)
class ResidencyStats:
    """A snapshot of slots, rows and leases."""

    layers: tuple[LayerSlots, ...]
    pools: tuple[PoolResidency, ...]
    num_rows: int
    free_rows: int
    running_requests: int
    slot_bytes: int
    is_draining: bool

    @property
    def total_slots(self) -> int:
        """Return the slots of all layers."""
        return sum(layer.slots for layer in self.layers)

    @property
    def used_slots(self) -> int:
        """Return the slots, of all layers, that are not free: resident or loading."""
        return sum(layer.slots - layer.free for layer in self.layers)


@dataclass(eq=False)
class _Entry:
    """One pool with a row. Until `is_published`, `settling` is on its way to make it so."""

    pool: ExpertPool
    row: int
    is_kept: bool
    is_published: bool = False
    leases: int = 0
    settling: asyncio.Task[None] = field(init=False)


class ResidencyManager:
    """Grant leases on pools whose experts are in device memory.

    `num_rows` counts the rows of the engine's pool table, the base pool's included; `slot_bytes` is
    the size of one expert of one layer, over all ranks. Pools must be complete and fit the model.
    """

    def __init__(
        self, slots: SlotTable, num_rows: int, engine: PoolEngine, *, slot_bytes: int
    ) -> None:
        if num_rows < 1:
            raise ConfigError(f"rows of the pool table: {num_rows}; expected at least 1")
        self._slots = slots
        self._num_rows = num_rows
        self._engine = engine
        self._slot_bytes = slot_bytes
        self._base_ids = tuple(tuple(range(count)) for count in slots.experts_per_layer)
        self._entries: dict[str, _Entry] = {}  # by content hash
        self._free_rows = list(range(_BASE_ROW + 1, num_rows))  # a heap
        self._idle: OrderedDict[str, _Entry] = OrderedDict()  # rows to reuse, oldest first
        self._loads: set[asyncio.Task[None]] = set()
        self._running = 0
        self._all_returned = asyncio.Event()
        self._is_draining = False

    # -- loading --

    async def load(self, pool: ExpertPool) -> None:
        """Make a pool resident for good; a no-op for one that is.

        Raises PoolTooLarge if the slab could never hold it, PoolNotResident if it does not fit
        beside what is resident, NoFreePoolRow without a row for it, and whatever the engine raises;
        then nothing has changed. Cancelling the caller does not stop the load.
        """
        while self._loads and pool.content_hash not in self._entries:
            await asyncio.wait(self._loads)  # one at a time: they share one link
        entry = self._entries.get(pool.content_hash)
        if entry is None:
            self._check_fits(pool)
            self._check_row(pool)
            entry = self._start(pool, is_kept=True)
        entry.is_kept = True
        self._idle.pop(pool.content_hash, None)
        await _settled(entry)

    # -- leases --

    def is_resident(self, pool: ExpertPool) -> bool:
        """Tell whether all the pool's experts are in device memory, loaded for it or for others."""
        return self._slots.covers(pool.expert_ids)

    def check_available(self, pool: ExpertPool) -> None:
        """Raise unless a lease would be granted now; ask before the first byte of a response.

        Raises Draining, PoolTooLarge, PoolNotResident or NoFreePoolRow.
        """
        if self._is_draining:
            raise Draining("the server is shutting down and takes no new requests")
        self._check_grantable(pool)

    @asynccontextmanager
    async def lease(self, pool: ExpertPool) -> AsyncIterator[Lease]:
        """Hold a resident pool's row and slots until exit; the exit never awaits.

        Raises as `check_available` does, save Draining: what was let in before is served to its
        end, though it take several leases (beam search). Raises what the engine raises if the pool
        needed a row published and that failed.
        """
        self._check_grantable(pool)
        key = pool.content_hash
        entry = self._entries.get(key) or self._start(pool, is_kept=False)
        self._idle.pop(key, None)
        entry.leases += 1
        self._running += 1
        try:
            if not entry.is_published:
                await _settled(entry)
            yield Lease(entry.row, pool)
        finally:
            entry.leases -= 1
            self._running -= 1
            self._note_idle(entry)
            if not self._running:
                self._all_returned.set()

    # -- shutdown --

    def start_draining(self) -> None:
        """Have `check_available` refuse everything from now on; running requests go on."""
        self._is_draining = True

    async def drained(self, timeout_seconds: float) -> bool:
        """Wait until no lease is held; return False when that takes too long."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._running:
                    self._all_returned.clear()
                    await self._all_returned.wait()
        except TimeoutError:
            return False
        return True

    # -- accounts --

    def statistics(self) -> ResidencyStats:
        """Return a snapshot; pools without a row are not in it."""
        return ResidencyStats(
            layers=self._slots.usage(),
            pools=tuple(
                PoolResidency(
                    name=entry.pool.name,
                    content_hash=key,
                    row=entry.row,
                    is_kept=entry.is_kept,
                    is_published=entry.is_published,
                    running_requests=entry.leases,
                )
                for key, entry in self._entries.items()
            ),
            num_rows=self._num_rows,
            free_rows=len(self._free_rows),
            running_requests=self._running,
            slot_bytes=self._slot_bytes,
            is_draining=self._is_draining,
        )

    def check_integrity(self) -> None:
        """Assert that slots, rows, entries and leases agree."""
        self._slots.check_integrity()
        assert self._slots.keys == self._entries.keys()
        rows = [entry.row for entry in self._entries.values()]
        taken = [row for row in rows if row != _BASE_ROW]
        assert len(set(rows)) == len(rows)
        assert sorted(taken + self._free_rows) == list(range(_BASE_ROW + 1, self._num_rows))
        idle = {key for key, entry in self._entries.items() if _is_reusable(entry)}
        assert self._idle.keys() == idle
        assert self._running >= sum(entry.leases for entry in self._entries.values())
        assert all(entry.leases >= 0 for entry in self._entries.values())

    # -- checks --

    def _check_grantable(self, pool: ExpertPool) -> None:
        entry = self._entries.get(pool.content_hash)
        if entry is not None and entry.is_published:
            return
        if not self.is_resident(pool):
            self._check_can_ever_fit(pool)
            missing = self._slots.num_absent(pool.expert_ids)
            raise PoolNotResident(
                f"pool {pool.name!r} is not resident: {missing} of its {_count(pool)} experts are"
                f" not in device memory; {self._resident_names()}"
            )
        if entry is None:
            self._check_row(pool)

    def _check_fits(self, pool: ExpertPool) -> None:
        """Refuse a pool with more missing experts than there are free slots."""
        self._check_can_ever_fit(pool)
        for need in self._slots.needs(pool.expert_ids):
            if need.missing > need.free:
                raise PoolNotResident(
                    f"pool {pool.name!r} does not fit beside what is resident: layer {need.layer}"
                    f" needs {need.missing} more slots and has {need.free} free of {need.slots};"
                    f" {self._resident_names()}"
                )

    def _check_can_ever_fit(self, pool: ExpertPool) -> None:
        needs = self._slots.needs(pool.expert_ids)
        worst = max(needs, key=lambda need: need.needed - need.slots, default=None)
        if worst is None or worst.needed <= worst.slots:
            return
        slots = sum(need.slots for need in needs)
        raise PoolTooLarge(
            f"pool {pool.name!r} can never be resident: layer {worst.layer} needs {worst.needed}"
            f" slots and has {worst.slots}; its {_count(pool)} experts take"
            f" {self._gib(_count(pool))}, the slab holds {slots}, {self._gib(slots)};"
            f" {self._resident_names()}; raise --expert-memory or --expert-slots to serve it"
        )

    def _check_row(self, pool: ExpertPool) -> None:
        if self._is_base(pool) or self._free_rows or self._idle:
            return
        raise NoFreePoolRow(
            f"pool {pool.name!r} needs a row of the pool table, and all {self._num_rows} are taken"
            f" by loaded pools and by unions with running requests; retry when a union's requests"
            f" have ended, or raise --max-pools"
        )

    def _is_base(self, pool: ExpertPool) -> bool:
        return pool.expert_ids == self._base_ids and pool.router_temperature == 1.0

    def _resident_names(self) -> str:
        names = sorted(entry.pool.name for entry in self._entries.values() if entry.is_kept)
        return f"resident pools: {', '.join(names) or 'none'}"

    def _gib(self, slots: int) -> str:
        return f"{slots * self._slot_bytes / 2**30:.3g} GiB"

    # -- entries --

    def _start(self, pool: ExpertPool, *, is_kept: bool) -> _Entry:
        """Take slots and a row for a pool that was checked, and set its task going."""
        plan = self._slots.plan_load(pool.content_hash, pool.expert_ids)
        self._slots.begin(plan)  # first: what it refers to must outlive the row's last owner
        is_base = self._is_base(pool)
        entry = _Entry(pool, _BASE_ROW if is_base else self._take_row(), is_kept or is_base)
        self._entries[plan.key] = entry
        entry.settling = asyncio.create_task(self._settle(entry, plan))
        if plan.copies:
            self._loads.add(entry.settling)
            entry.settling.add_done_callback(self._loads.discard)
        entry.settling.add_done_callback(_mark_retrieved)
        return entry

    async def _settle(self, entry: _Entry, plan: LoadPlan) -> None:
        """Copy and publish; a failure of either takes back slots, row and entry."""
        pool = entry.pool
        try:
            if plan.copies:
                report = await self._engine.load_experts(plan.copies)
                logger.info(
                    "loaded pool %s: %d experts of %d copied, %d bytes read in %.2f s",
                    pool.name,
                    len(plan.copies),
                    _count(pool),
                    report.bytes_read,
                    report.seconds,
                )
            await self._engine.publish_pool(entry.row, pool.expert_ids, pool.router_temperature)
        except BaseException as error:
            if isinstance(error, Exception):  # a cancellation is the event loop's end
                logger.error("pool %s could not be made resident: %s", pool.name, error)
            self._slots.abandon(plan.key)
            self._drop(entry)
            raise
        self._slots.finish(plan.key)
        entry.is_published = True
        self._note_idle(entry)

    def _take_row(self) -> int:
        if not self._free_rows:
            key, victim = next(iter(self._idle.items()))
            self._slots.evict(key)
            self._drop(victim)
        return heapq.heappop(self._free_rows)

    def _drop(self, entry: _Entry) -> None:
        key = entry.pool.content_hash
        del self._entries[key]
        self._idle.pop(key, None)
        if entry.row != _BASE_ROW:
            heapq.heappush(self._free_rows, entry.row)

    def _note_idle(self, entry: _Entry) -> None:
        if _is_reusable(entry):
            self._idle[entry.pool.content_hash] = entry


def _is_reusable(entry: _Entry) -> bool:
    return entry.is_published and not entry.is_kept and not entry.leases


async def _settled(entry: _Entry) -> None:
    """Wait for a pool's task without owning it, and raise what it raised."""
    await asyncio.wait((entry.settling,))
    entry.settling.result()


def _mark_retrieved(task: asyncio.Task[None]) -> None:
    """Keep asyncio from reporting a failure whose every waiter has gone; it was logged."""
    if not task.cancelled():
        task.exception()


def _count(pool: ExpertPool) -> int:
    return sum(map(len, pool.expert_ids))
