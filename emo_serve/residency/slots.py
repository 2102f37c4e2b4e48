"""The one account of expert slots: (layer, expert) -> slot, and the pools that refer to each.

Pure bookkeeping: no weights, no clock, no awaiting. A load has three steps, because the copies take
time and may fail:

    table.fits(expert_ids, without=victims)           # would there be slots enough
    plan = table.plan_load(key, expert_ids, victims)  # decides, changes nothing
    table.begin(plan)    # evicts, takes slots and references; new experts are loading
    table.finish(key)  or  table.abandon(key)         # they are resident, or they never came

Pools share experts. A plan copies only what is missing, and an eviction frees only the slots that
no other pool refers to: an expert of a victim that the new pool needs stays where it is. Any number
of loads may be under way as long as none needs an expert that another is still loading; plans that
copy nothing are resident as soon as they begin. Slots are handed out lowest first, so equal
histories give equal tables.

Who refers to an expert is asked of sets of pools, and often. So each pool is also one integer with
a bit for each expert of each layer: a union is one `|`, and an expert that no other pool refers to
is a bit that their union lacks. There are no counts to keep in step.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from emo_serve.errors import ConfigError

__all__ = ["Copy", "ExpertIds", "LayerMap", "LayerNeed", "LayerSlots", "LoadPlan", "SlotTable"]

ExpertIds = Sequence[Sequence[int]]
"""Expert ids of each layer; an empty entry for a dense one."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Put one expert of one layer into one slot of that layer."""

    layer: int
    expert: int
    slot: int


@dataclass(frozen=True)
class LoadPlan:
    """What it takes to make one pool resident; valid until the table next changes.

    `evictions` are the pools to drop first, by key.
    """

    key: str
    expert_ids: tuple[tuple[int, ...], ...]
    evictions: tuple[str, ...]
    copies: tuple[Copy, ...]
    version: int


@dataclass(frozen=True)
class LayerNeed:
    """What a set of experts asks of one layer: slots in all, and experts still to be copied."""

    layer: int
    needed: int
    missing: int
    free: int
    slots: int


@dataclass(frozen=True)
class LayerSlots:
    """The slots of one layer: slots == free + resident + loading."""

    slots: int
    free: int
    resident: int
    loading: int


@dataclass(frozen=True)
class LayerMap:
    """The slots of one layer, in order: the expert in each, or None, and who refers to it.

    `holders` are places in a list of pools. The experts in the slots `loading` are on their way.
    """

    experts: tuple[int | None, ...]
    holders: tuple[tuple[int, ...], ...]
    loading: tuple[int, ...]


@dataclass
class _Layer:
    num_experts: int
    first_bit: int
    expert_in: list[int | None]
    slot_of: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)  # a heap
    loading: set[int] = field(default_factory=set)

    def share(self, bits: int) -> int:
        """Return this layer's part of a set of experts, its first expert's bit lowest."""
        return (bits >> self.first_bit) & ((1 << self.num_experts) - 1)

    def members(self, bits: int) -> Iterator[int]:
        """Return the experts of this layer that are in a set, ascending."""
        share = self.share(bits)
        while share:
            lowest = share & -share
            yield lowest.bit_length() - 1
            share ^= lowest


class SlotTable:
    """Know which expert sits in which slot, and which pools keep it there.

    `experts_per_layer` is 0 for a dense layer. A layer with fewer experts than `slots_per_layer`
    has one slot for each. Keys are opaque here; the manager uses a pool's content hash.
    """

    def __init__(self, experts_per_layer: Sequence[int], slots_per_layer: int) -> None:
        if slots_per_layer < 1:
            raise ConfigError(f"slots a layer is {slots_per_layer}; expected at least 1")
        self._layers: list[_Layer] = []
        first_bit = 0
        for num_experts in experts_per_layer:
            slots = min(slots_per_layer, num_experts)
            empty: list[int | None] = [None] * slots
            self._layers.append(_Layer(num_experts, first_bit, empty, free=list(range(slots))))
            first_bit += num_experts
        self._num_slots = sum(len(held.expert_in) for held in self._layers)
        self._pools: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._bits: dict[str, int] = {}  # the same, for set arithmetic
        self._resident = 0  # bits of the experts that are in place
        self._copying: dict[str, tuple[Copy, ...]] = {}
        self._version = 0

    # -- questions --

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Return the number of experts the model has in each layer."""
        return tuple(layer.num_experts for layer in self._layers)

    @property
    def keys(self) -> frozenset[str]:
        """Return the keys of all pools that hold slots, loading ones included."""
        return frozenset(self._pools)

    def slot_of(self, layer: int, expert: int) -> int | None:
        """Return the slot in which an expert is resident; None while it is absent or loading."""
        held = self._layers[layer]
        return None if expert in held.loading else held.slot_of.get(expert)

    def needs(self, expert_ids: ExpertIds) -> tuple[LayerNeed, ...]:
        """Return, for each layer, what making these experts resident would take now."""
        return tuple(
            LayerNeed(
                layer=index,
                needed=len(experts),
                missing=sum(expert not in held.slot_of for expert in experts),
                free=len(held.free),
                slots=len(held.expert_in),
            )
            for index, (held, experts) in enumerate(zip(self._layers, expert_ids, strict=True))
        )

    def could_hold(self, expert_ids: ExpertIds) -> bool:
        """Tell whether the table, if it were empty, would have slots for these experts."""
        return all(
            len(experts) <= len(held.expert_in)
            for held, experts in zip(self._layers, expert_ids, strict=True)
        )

    def fits(self, *wanted: ExpertIds, without: Collection[str] = ()) -> bool:
        """Tell whether all of these could be resident together with every pool but `without`.

        Pools are sets, so that is a question of each layer's union, whatever the order of loads.
        """
        experts = self.held_by(self._pools.keys() - set(without))
        for expert_ids in wanted:
            experts |= self.bits(expert_ids)
        return self.can_hold(experts)

    def slots_of(self, keys: Iterable[str]) -> int:
        """Count the slots, of all layers, that these pools hold; a shared one counts once."""
        return self.held_by(keys).bit_count()

    def redundant(self, keys: Sequence[str]) -> set[str]:
        """Return which of these pools could go, all of them, and no slot would be free for it.

        Where pools cover each other, those named first are chosen.
        """
        later: list[int] = [0]
        for key in reversed(keys):
            later.append(later[-1] | self._bits[key])
        stay = self.held_by(self._pools.keys() - set(keys))
        chosen: set[str] = set()
        for key in keys:
            later.pop()
            if self._bits[key] & ~(stay | later[-1]):
                stay |= self._bits[key]
            else:
                chosen.add(key)
        return chosen

    # -- set arithmetic --

    def bits(self, expert_ids: ExpertIds) -> int:
        """Return experts as bits of one number."""
        bits = 0
        for held, experts in zip(self._layers, expert_ids, strict=True):
            mine = 0
            for expert in experts:
                mine |= 1 << expert
            assert not mine >> held.num_experts, "an expert the layer does not have"
            bits |= mine << held.first_bit
        return bits

    def held_by(self, keys: Iterable[str]) -> int:
        """Return as bits the experts that any of these pools refers to."""
        bits = 0
        for key in keys:
            bits |= self._bits[key]
        return bits

    def can_hold(self, bits: int) -> bool:
        """Tell whether the table, but for these experts empty, would have slots for them all."""
        if bits.bit_count() > self._num_slots:
            return False
        return all(held.share(bits).bit_count() <= len(held.expert_in) for held in self._layers)

    def covers_bits(self, bits: int) -> bool:
        """Tell whether every one of these experts is resident."""
        return not bits & ~self._resident

    def usage(self) -> tuple[LayerSlots, ...]:
        """Return the account of each layer's slots; a dense layer has none."""
        return tuple(
            LayerSlots(
                slots=len(held.expert_in),
                free=len(held.free),
                resident=len(held.slot_of) - len(held.loading),
                loading=len(held.loading),
            )
            for held in self._layers
        )

    @property
    def version(self) -> int:
        """Return a number that grows with every change."""
        return self._version

    def layer_maps(self, keys: Sequence[str]) -> tuple[LayerMap, ...]:
        """Return what is in every slot; holders are places in `keys`, which must be all keys."""
        maps = []
        for index, held in enumerate(self._layers):
            holders: list[list[int]] = [[] for _ in held.expert_in]
            for place, key in enumerate(keys):
                for expert in self._pools[key][index]:
                    holders[held.slot_of[expert]].append(place)
            maps.append(
                LayerMap(
                    experts=tuple(held.expert_in),
                    holders=tuple(map(tuple, holders)),
                    loading=tuple(sorted(held.slot_of[expert] for expert in held.loading)),
                )
            )
        return tuple(maps)

    # -- changes --

    def plan_load(self, key: str, expert_ids: ExpertIds, evictions: Sequence[str] = ()) -> LoadPlan:
        """Choose a slot for every missing expert; the caller has asked `fits` that they fit."""
        assert key not in self._pools, f"{key} holds its slots already"
        staying = self.held_by(self._pools.keys() - set(evictions)) | self.bits(expert_ids)
        freed = self.held_by(evictions) & ~staying
        copies: list[Copy] = []
        for index, (held, experts) in enumerate(zip(self._layers, expert_ids, strict=True)):
            assert not held.loading.intersection(experts), "an expert needed is still loading"
            missing = [expert for expert in sorted(experts) if expert not in held.slot_of]
            given_up = (held.slot_of[expert] for expert in held.members(freed))
            slots = heapq.nsmallest(len(missing), [*held.free, *given_up])
            assert len(slots) == len(missing), f"layer {index} has too few free slots"
            pairs = zip(missing, slots, strict=True)
            copies += (Copy(index, expert, slot) for expert, slot in pairs)
        ids = tuple(map(tuple, expert_ids))
        return LoadPlan(key, ids, tuple(evictions), tuple(copies), self._version)

    def begin(self, plan: LoadPlan) -> None:
        """Evict, and take the plan's slots and references, which nothing can free from now on."""
        assert plan.version == self._version, "the table changed since the plan was made"
        self._version += 1
        self._pools[plan.key] = plan.expert_ids  # before the evictions: what both need stays
        self._bits[plan.key] = self.bits(plan.expert_ids)
        for key in plan.evictions:
            self._drop(key)
        for copy in plan.copies:
            held = self._layers[copy.layer]
            slot = heapq.heappop(held.free)
            assert slot == copy.slot
            held.slot_of[copy.expert] = copy.slot
            held.expert_in[copy.slot] = copy.expert
            held.loading.add(copy.expert)
        if plan.copies:
            self._copying[plan.key] = plan.copies

    def finish(self, key: str) -> None:
        """Count the copied experts as resident; does nothing for a pool that copied none."""
        assert key in self._pools, f"{key} holds no slots"
        self._version += 1
        for copy in self._copying.pop(key, ()):
            self._layers[copy.layer].loading.remove(copy.expert)
        self._resident |= self._bits[key]

    def abandon(self, key: str) -> None:
        """Undo a load that failed: its slots and references go back."""
        self.finish(key)
        self.evict(key)

    def evict(self, key: str) -> tuple[Copy, ...]:
        """Drop a pool's references and return what that freed: experts no other pool refers to."""
        self._version += 1
        return self._drop(key)

    def _drop(self, key: str) -> tuple[Copy, ...]:
        assert key not in self._copying, f"{key} is loading"
        del self._pools[key]
        bits = self._bits.pop(key) & ~self.held_by(self._pools)
        self._resident &= ~bits
        freed: list[Copy] = []
        for index, held in enumerate(self._layers):
            for expert in held.members(bits):
                slot = held.slot_of.pop(expert)
                held.expert_in[slot] = None
                heapq.heappush(held.free, slot)
                freed.append(Copy(index, expert, slot))
        return tuple(freed)

    # -- self-check --

    def check_integrity(self) -> None:
        """Assert that slots, experts and references tell one story."""
        assert self._bits == {key: self.bits(ids) for key, ids in self._pools.items()}
        in_place = [held.slot_of.keys() - held.loading for held in self._layers]
        assert self._resident == self.bits(list(map(sorted, in_place)))
        copying = {(c.layer, c.expert) for copies in self._copying.values() for c in copies}
        assert self._copying.keys() <= self._pools.keys()
        assert copying == {(i, e) for i, held in enumerate(self._layers) for e in held.loading}
        for index, held in enumerate(self._layers):
            assert held.slot_of == dict(_occupied(held))
            assert held.slot_of.keys() == {e for ids in self._pools.values() for e in ids[index]}
            empty = [slot for slot, expert in enumerate(held.expert_in) if expert is None]
            assert sorted(held.free) == empty
            assert all(0 <= expert < held.num_experts for expert in held.slot_of)


def _occupied(held: _Layer) -> Iterator[tuple[int, int]]:
    for slot, expert in enumerate(held.expert_in):
        if expert is not None:
            yield expert, slot
