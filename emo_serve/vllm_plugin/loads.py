"""Loads: experts copied into slots on a thread of their own, while the engine goes on decoding.

The thread must not slow decoding down. It works in pieces and sleeps between them; it opens no
OpenMP team, whose threads would run on the model's cores; and if there is a core to which vLLM has
bound no thread of the model, it stays there.

No token can see a load before it is published: tokens reach a slot through the pool table and
`slot_of_expert`, and both are written at publication, between two steps. With CUDA a step in flight
may still read a slot that a load reuses, so the copies run on a stream that first waits for all
work issued before the load began; publishing makes the model's stream wait for the copies.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from emo_serve.errors import EmoServeError
from emo_serve.vllm_plugin.expert_store import ExpertStore, StoreCounts
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert

__all__ = ["CpuMover", "CudaMover", "ExpertLoad", "Mover", "SlotCopy"]

logger = logging.getLogger(__name__)

_SHORTEST_REST_SECONDS = 5e-5

SlotCopy = tuple[int, int, int]
"""Layer, expert, slot."""


class Mover(Protocol):
    """Move experts from the store into slots of one kind of device.

    After each piece the load rests, `rest` times as long as the piece took.
    """

    @property
    def rest(self) -> float:
        """Return how much to rest now; 0 for not at all."""

    def begin(self) -> None:
        """Take note, between two steps, of the work issued so far; copies come after it."""

    def move(self, copy: SlotCopy) -> Iterator[None]:
        """Copy one expert, a piece a step; on the load's thread."""

    def end(self) -> None:
        """Return when no copy is under way; on the load's thread."""

    def join(self) -> None:
        """Have the steps from now on see the copies; between two steps."""


class CpuMover:
    """Copies in main memory, which the model's cores read as well: small pieces, with rests.

    `is_decoding` tells whether the engine has tokens to compute; if not, no rests are needed.
    """

    piece_bytes = 128 << 10  # residency/loading.py; 64 KiB is felt less and takes twice as long
    decoding_rest = (
        8.0  # residency/loading.py; 4 is felt, and a nice value costs more than it saves
    )

    def __init__(
        self,
        store: ExpertStore,
        slot: Callable[[int, int], PackedExpert],
        is_decoding: Callable[[], bool],
    ) -> None:
        self._store, self._slot, self._is_decoding = store, slot, is_decoding

    @property
    def rest(self) -> float:
        return self.decoding_rest if self._is_decoding() else 0.0

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
    rest: float = 0.0

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
            _stand_aside()
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
        for copy in self.copies:
            start = time.perf_counter()
            for _ in self._mover.move(copy):
                if self._stopping:
                    raise EmoServeError("the engine is shutting down")
                if rest := self._mover.rest:
                    worked = time.perf_counter() - start
                    time.sleep(max(_SHORTEST_REST_SECONDS, rest * worked))
                start = time.perf_counter()
            self.experts_copied += 1

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.state = "failed"


# -- the thread's place --


def _stand_aside() -> None:
    """Keep this thread to one core at a time, off the model's.

    At its usual priority: one that waits for a core while it holds the interpreter's lock would
    have the model wait as well.
    """
    _use_one_openmp_thread()
    spare = _spare_cores()
    if spare:
        os.sched_setaffinity(0, spare)


def _use_one_openmp_thread() -> None:
    """Have parallel regions begun by this thread run on it alone.

    The number of threads is a setting of the calling thread in OpenMP, not of the process. torch
    has a call for it, which vLLM's CPU worker replaces by one that does nothing, so we ask the
    runtime that is loaded.
    """
    torch.get_num_threads()  # torch sets a new thread's number at its first question
    for runtime in _openmp_runtimes():
        runtime.omp_set_num_threads(1)


@cache  # reading and searching the maps of a process this size takes as long as a small load
def _openmp_runtimes() -> tuple[ctypes.CDLL, ...]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ()
    names = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b[^\s/]*\.so\S*", maps.read_text())
    return tuple(ctypes.CDLL(name) for name in sorted(set(names)))


@cache  # vLLM binds its threads before the first load
def _spare_cores() -> frozenset[int]:
    """Return the cores this process may use and no model thread of the engine is bound to.

    vLLM binds a CPU worker's threads to cores; its parent process keeps all that it was given.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    parent = os.getppid()
    allowed = os.sched_getaffinity(parent)
    bound: set[int] = set()
    for worker in _children(parent):
        for task in Path(f"/proc/{worker}/task").iterdir():
            try:
                cores = os.sched_getaffinity(int(task.name))
            except ProcessLookupError:
                continue
            if cores < allowed:
                bound |= cores
    return frozenset(allowed - bound)


def _children(parent: int) -> list[int]:
    """Return the children of a process, this one at least."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    found = {int(pid) for path in lists for pid in path.read_text().split()}
    return sorted(found | {os.getpid()})
