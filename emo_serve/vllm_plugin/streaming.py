"""Streamed pools: more experts than slots, which pass through a few slots kept for that.

A pool too large for its layers' slots, such as the base pool, routes as every pool does. But then a
layer reads the experts that its tokens chose and that are in no slot into stream slots, where the
least recently used make room. If they do not all fit, they are computed in turns, and the sums of
the turns are added in fp32. So a streamed pool is exact, and slow in proportion to what it reads.
Experts that are in a slot for another pool are computed there. Slots into which nothing was ever
loaded serve as stream slots until a load takes them.

This needs the choice of experts on the host in the middle of a step, so it works on CPUs only: in
CUDA graphs a step does not wait for the host.

No slot changes while it is read: stream slots are written by the thread that computes, and from the
start of a load to its publication its slots count as empty here.

Shapes: T tokens, D hidden size, E experts, K experts a token takes.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from emo_serve.vllm_plugin.expert_store import ExpertStore
from emo_serve.vllm_plugin.packed import Slab

__all__ = ["LayerStream", "SlotBackend", "StreamCounts", "StreamReader"]

_EMPTY = -1


@runtime_checkable
class SlotBackend(Protocol):
    """Compute experts by their slots; the backends of CPUs do."""

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D].

        Weights are fp32 and slots int32, all contiguous; a place of weight 0 is not computed.
        """


class StreamCounts:
    """What streaming has read since the start: experts, and the seconds that steps waited."""

    def __init__(self) -> None:
        self.experts, self.seconds = 0, 0.0


class StreamReader:
    """Read experts into slots at once, in the thread that computes."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.counts = StreamCounts()

    def read(self, layer: int, experts: Sequence[int], slots: Sequence[int], slab: Slab) -> None:
        """Read experts of a layer, each into its slot; raises CheckpointError."""
        start = time.perf_counter()
        for expert in experts:
            self._store.read_ahead(layer, expert)
        for expert, number in zip(experts, slots, strict=True):
            slot = slab.slot(number)
            steps = self._store.fetch(layer, expert, spare=slot)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    source = end.value
                    break
            if source is not slot:
                for target, filled in zip(slot.tensors(), source.tensors(), strict=True):
                    target.copy_(filled)
        self.counts.experts += len(experts)
        self.counts.seconds += time.perf_counter() - start


class LayerStream:
    """The stream slots of one layer, and which expert is in which slot of the whole slab.

    Of `num_slots` in all, loads may take the first `num_for_loads`. Every method is to be called in
    the thread that computes.
    """

    def __init__(self, num_experts: int, num_slots: int, num_for_loads: int, num_rows: int) -> None:
        assert num_for_loads < num_slots
        self.slot_of = torch.full((num_experts,), _EMPTY, dtype=torch.int32)
        self._expert_in = [_EMPTY] * num_slots
        # Slots for streaming, the next to make room first: at first those that no load can take.
        order = (*range(num_for_loads, num_slots), *range(num_for_loads))
        self._least_recent = OrderedDict.fromkeys(order)
        self._is_streamed = torch.zeros(num_rows, dtype=torch.bool)
        self._any_streamed = False
        self._layer = 0
        self._reader: StreamReader | None = None

    def open(self, layer: int, reader: StreamReader) -> None:
        """Take note of this layer's index, and of what reads its experts."""
        self._layer, self._reader = layer, reader

    # -- between two steps --

    def set_row(self, row: int, *, is_streamed: bool) -> None:
        """Note whether the pool of a row may choose experts that are in no slot."""
        self._is_streamed[row] = is_streamed
        self._any_streamed = bool(self._is_streamed.any())

    def give_up(self, slot: int) -> None:
        """Note that a load begins to write to a slot."""
        self._least_recent.pop(slot, None)
        self._put(slot, _EMPTY)

    def note(self, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Note that a load has put each of these experts into its slot."""
        for expert, slot in zip(experts, slots, strict=True):
            self._put(slot, expert)

    # -- in a step --

    def has_streamed(self, pool_rows_T: Tensor) -> bool:
        """Tell whether any token of a step is of a streamed pool."""
        return self._any_streamed and bool(self._is_streamed[pool_rows_T].any())

    def mix(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        slab: Slab,
        backend: SlotBackend,
    ) -> Tensor:
        """Return the weighted sum of the experts, [T, D]; raises CheckpointError."""
        taken_TK = weights_TK != 0
        y_TD: Tensor | None = None
        for turn, is_only in self._turns(experts_TK[taken_TK].unique().tolist(), slab):
            if is_only:
                return backend.compute(x_TD, weights_TK, self._slots(experts_TK), slab)
            if y_TD is None:
                y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
            in_turn_E = torch.zeros(len(self.slot_of), dtype=torch.bool)
            in_turn_E[turn] = True
            now_TK = taken_TK & in_turn_E[experts_TK]
            tokens = now_TK.any(1).nonzero()[:, 0]
            weights = weights_TK[tokens].masked_fill(~now_TK[tokens], 0.0)
            part = backend.compute(x_TD[tokens], weights, self._slots(experts_TK[tokens]), slab)
            y_TD.index_add_(0, tokens, part.float())
        return torch.zeros_like(x_TD) if y_TD is None else y_TD.to(x_TD.dtype)

    def _turns(self, experts: Sequence[int], slab: Slab) -> Iterator[tuple[list[int], bool]]:
        """Bring the experts into slots, as many at a time as fit; tell whether they all do.

        The slots stand until the next turn.
        """
        slots = self.slot_of[experts].tolist() if experts else []
        here = [expert for expert, slot in zip(experts, slots, strict=True) if slot != _EMPTY]
        missing = [expert for expert, slot in zip(experts, slots, strict=True) if slot == _EMPTY]
        for slot in slots:
            self._note_use(slot)
        in_use = set(slots)
        free = [slot for slot in self._least_recent if slot not in in_use]
        first, missing = missing[: len(free)], missing[len(free) :]
        self._bring(first, free[: len(first)], slab)
        if experts:
            yield [*here, *first], not missing
        while missing:
            free = list(self._least_recent)
            turn, missing = missing[: len(free)], missing[len(free) :]
            self._bring(turn, free[: len(turn)], slab)
            yield turn, False

    def _bring(self, experts: Sequence[int], slots: Sequence[int], slab: Slab) -> None:
        if not experts:
            return
        assert self._reader is not None, "an engine without an expert store streams nothing"
        for slot in slots:  # if a read fails, nothing is where it was not
            self._put(slot, _EMPTY)
        self._reader.read(self._layer, experts, slots, slab)
        self.note(experts, slots)
        for slot in slots:
            self._note_use(slot)

    def _slots(self, experts_TK: Tensor) -> Tensor:
        """Return slots; an expert that is in none has any, since its weight is 0."""
        return self.slot_of[experts_TK].clamp_min(0)

    def _note_use(self, slot: int) -> None:
        if slot in self._least_recent:
            self._least_recent.move_to_end(slot)

    def _put(self, slot: int, expert: int) -> None:
        """Have an expert in a slot, in no other, and nothing else there."""
        before = self._expert_in[slot]
        if before != _EMPTY and int(self.slot_of[before]) == slot:
            self.slot_of[before] = _EMPTY
        self._expert_in[slot] = expert
        if expert != _EMPTY:
            self.slot_of[expert] = slot

    def check_integrity(self) -> None:
        """Assert that slots and experts tell one story."""
        for expert, slot in enumerate(self.slot_of.tolist()):
            assert slot == _EMPTY or self._expert_in[slot] == expert
