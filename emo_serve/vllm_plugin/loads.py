"""Loads: experts copied into slots on a thread of their own, while the engine goes on decoding.

The thread must not slow decoding down. It works in pieces and rests between them (`pacing`), and
stays off the model's cores if it can (`thread_place`). While it packs and rests, the kernel reads
the experts that come next, so a disk is never idle.

No token can see a load before it is published: tokens reach a slot through the pool table and
`slot_of_expert`, and both are written at publication, between two steps. With CUDA a step in flight
may still read a slot that a load reuses, so the copies run on a stream that first waits for all
work issued before the load began; publishing makes the model's stream wait for the copies.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from emo_serve.errors import EmoServeError
from emo_serve.vllm_plugin.expert_store import ExpertStore, StoreCounts
from emo_serve.vllm_plugin.pacing import Pacer, Steps
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert
from emo_serve.vllm_plugin.thread_place import stand_aside

__all__ = ["CpuMover", "CudaMover", "ExpertLoad", "Mover", "SlotCopy"]

logger = logging.getLogger(__name__)

SlotCopy = tuple[int, int, int]
"""Layer, expert, slot."""


class Mover(Protocol):
    """Move experts from the store into slots of one kind of device.

    `pacer` makes the load rest between pieces; None where its work takes nothing from the model.
    """

    @property
    def pacer(self) -> Pacer | None:
        """Return what keeps the load's thread to its share."""

    def begin(self) -> None:
        """Take note, between two steps, of the work issued so far; copies come after it."""

    def move(self, copy: SlotCopy) -> Iterator[None]:
        """Copy one expert, a piece a step; on the load's thread."""

    def end(self) -> None:
        """Return when no copy is under way; on the load's thread."""

    def join(self) -> None:
        """Have the steps from now on see the copies; between two steps."""


class CpuMover:
    """Copies in main memory, by the same cores that compute."""

    piece_bytes = 512 << 10  # a third of a millisecond to read and pack

    def __init__(
        self, store: ExpertStore, slot: Callable[[int, int], PackedExpert], steps: Steps
    ) -> None:
        self._store, self._slot = store, slot
        self.pacer = Pacer(steps)

    def begin(self) -> None:
        pass

    def move(self, copy: SlotCopy) -> Iterator[None]:
        layer, expert, number = copy
        slot = self._slot(layer, number)
        source = yield from self._store.fetch(layer, expert, spare=slot)
        if source is slot:
            return
        for target, filled in zip(slot.tensors(), source.tensors(), strict=True):
            size = self.piece_bytes // filled.itemsize
            parts = zip(target.view(-1).split(size), filled.view(-1).split(size), strict=True)
            for to_part, from_part in parts:
                to_part.copy_(from_part)
                yield

    def end(self) -> None:
        pass

    def join(self) -> None:
        pass


class CudaMover:
    """Copies on a stream of their own, out of pinned memory; the host's cores stay free."""

    piece_bytes = 4 << 20
    pacer = None

    def __init__(
        self,
        store: ExpertStore,
        slot: Callable[[int, int], PackedExpert],
        shape: ExpertShape,
        device: torch.device,
    ) -> None:
        self._store, self._slot, self._device = store, slot, device
        memory = torch.empty((2, shape.num_bytes), dtype=torch.uint8, device="cpu", pin_memory=True)
        self._staging = [shape.view(part) for part in memory]  # one fills while the other is copied
        self._stream = torch.cuda.Stream(device)
        self._issued: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._issued = torch.cuda.Event()
        self._issued.record(torch.cuda.current_stream(self._device))

    def move(self, copy: SlotCopy) -> Iterator[None]:
        assert self._issued is not None
        torch.cuda.set_device(self._device)  # a setting of the thread
        layer, expert, number = copy
        self._staging.reverse()
        source = yield from self._store.fetch(layer, expert, spare=self._staging[0])
        slot = self._slot(layer, number)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._issued)
            for target, filled in zip(slot.tensors(), source.tensors(), strict=True):
                target.copy_(filled, non_blocking=True)
            source.in_flight = self._stream.record_event()
        yield

    def end(self) -> None:
        self._copied = self._stream.record_event()
        self._copied.synchronize()  # sync: the load's thread alone waits for its copies

    def join(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)


class ExpertLoad:
    """One load, from its start to its publication: loading, copied, published; or failed.

    What a failed load wrote into its slots does not matter: they were free, and are free again.
    """

    def __init__(
        self, load_id: int, copies: Sequence[SlotCopy], mover: Mover, store: ExpertStore
    ) -> None:
        self.load_id = load_id
        self.state = "loading"
        self.failure: str | None = None
        self.experts_copied = 0
        self.copies = copies
        self._mover, self._store = mover, store
        self._before = store.counts
        self._stopping = False
        mover.begin()
        self._thread = threading.Thread(target=self._run, name="emo-load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the load early, for good, and wait for its thread."""
        self._stopping = True
        self._thread.join()

    def publish(self, apply: Callable[[Sequence[SlotCopy]], None]) -> None:
        """Have the steps from now on see the copies; between two steps, once all are made."""
        assert self.state == "copied", self.state
        self._mover.join()
        apply(self.copies)
        self.state = "published"

    @property
    def counts(self) -> StoreCounts:
        """Return what the load took from the store so far."""
        return self._store.counts.since(self._before)

    def _run(self) -> None:
        try:
            is_aside = stand_aside()
            if self._mover.pacer is not None:
                self._mover.pacer.begin(is_aside=is_aside)
            with torch.inference_mode():  # a thread has modes of its own
                try:
                    self._copy_all()
                finally:
                    self._mover.end()  # of a failed load, too, no copy may be under way
        except EmoServeError as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("load %d failed", self.load_id)
            self._fail(f"{type(error).__name__}: {error}")
        else:
            self.state = "copied"

    def _copy_all(self) -> None:
        announced = 0
        for number, copy in enumerate(self.copies):
            soon = min(len(self.copies), number + self._store.experts_ahead)
            for layer, expert, _ in self.copies[announced:soon]:
                self._store.read_ahead(layer, expert)
                self._pause()
            announced = soon
            for _ in self._mover.move(copy):
                self._pause()
            self.experts_copied += 1

    def _pause(self) -> None:
        if self._stopping:
            raise EmoServeError("the engine is shutting down")
        if self._mover.pacer is not None:
            self._mover.pacer.pause()

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.state = "failed"
