"""Where experts live when they hold no slot: host memory, and below it the checkpoint's files.

What comes out is packed: in the slab's dtype and layout, ready to be copied. Without host memory an
expert is packed where the caller says.

Each rank holds its own part of an expert's width. Experts are read and packed in pieces, one piece
per step of a generator, so that a background load can pause between two pieces.

Shapes: D hidden size, F expert width on this rank.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.errors import CheckpointError
from emo_serve.facts import MATRICES
from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert, PackedMatrix

__all__ = [
    "ExpertStore",
    "HostMemory",
    "StoreCounts",
]

_BYTES_AHEAD = 64 << 20  # 40 to 120 ms of a disk; in the page cache they displace little


@dataclass(frozen=True)
class StoreCounts:
    """What a store has done so far: bytes read from files, and experts found in each place."""

    bytes_read: int = 0
    disk_reads: int = 0
    host_hits: int = 0

    def since(self, before: StoreCounts) -> StoreCounts:
        """Return what was added after `before`."""
        return StoreCounts(
            self.bytes_read - before.bytes_read,
            self.disk_reads - before.disk_reads,
            self.host_hits - before.host_hits,
        )


class HostMemory:
    """Packed experts by (layer, expert) in a fixed arena; the least recently used makes room.

    The arena consists of places for one expert each. It is allocated whole at start-up and never
    grows. With CUDA it is pinned: registered rather than allocated as pinned, because torch's
    pinned allocator rounds up to a power of two. A library's cache would not do: eviction must hand
    over the memory it frees, and memory being filled must belong to no expert, so that a failed
    read leaves nothing behind.

    Threads may share it. Each reads through a store of its own, its `reader`; what a reader got
    last stays in place until it asks again.
    """

    def __init__(self, num_bytes: int, shape: ExpertShape, *, is_pinned: bool) -> None:
        count = num_bytes // shape.num_bytes
        self._arena = torch.empty((count, shape.num_bytes), dtype=torch.uint8, device="cpu")
        if is_pinned and count:
            status = torch.cuda.cudart().cudaHostRegister(
                self._arena.data_ptr(), self._arena.nbytes, 0
            )
            torch.cuda.check_error(status)
        self._free = [shape.view(part) for part in self._arena]
        self._held: OrderedDict[tuple[int, int], PackedExpert] = OrderedDict()
        self._last: dict[object, tuple[int, int]] = {}  # what each reader got last
        self._twice: dict[object, PackedExpert] = {}  # what another reader had put in before
        self._lock = threading.Lock()
        self.num_bytes = self._arena.nbytes

    def get(self, key: tuple[int, int], reader: object) -> PackedExpert | None:
        """Return an expert if it is here, and mark it as the most recently used."""
        with self._lock:
            self._last.pop(reader, None)
            if (memory := self._twice.pop(reader, None)) is not None:
                self._free.append(memory)
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self._last[reader] = key
            return found

    def take(self) -> PackedExpert | None:
        """Return memory to fill, evicting if none is free; None if there is none to be had."""
        with self._lock:
            if self._free:
                return self._free.pop()
            in_use = set(self._last.values())
            oldest = next((key for key in self._held if key not in in_use), None)
            return None if oldest is None else self._held.pop(oldest)

    def put(self, key: tuple[int, int], filled: PackedExpert, reader: object) -> None:
        """Remember an expert in memory that `take` returned, unless another reader was faster."""
        with self._lock:
            if key in self._held:
                self._twice[reader] = filled  # which the reader has yet to read
            else:
                self._held[key] = filled
                self._last[reader] = key

    def give_back(self, memory: PackedExpert) -> None:
        """Return memory from `take` that was not filled."""
        with self._lock:
            self._free.append(memory)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)


class ExpertStore:
    """Read and pack this rank's part of a checkpoint's experts; for one thread at a time.

    A step reads about `piece_bytes`, and at least one of the backend's blocks of rows. A load asks
    for `experts_ahead` experts before it fetches them, the one it fetches among them.
    """

    def __init__(
        self,
        checkpoint: ModelCheckpoint,
        backend: MoeBackend,
        shape: ExpertShape,
        host: HostMemory,
        piece_bytes: int,
    ) -> None:
        self.experts_ahead = max(2, _BYTES_AHEAD // max(1, checkpoint.expert_bytes))
        self._checkpoint, self._names = checkpoint, checkpoint.facts.names
        self._backend = backend
        self._shape = shape
        self._piece_bytes = piece_bytes
        self.host = host
        self._rows: dict[torch.dtype, Tensor] = {}  # for one piece in the file's dtype
        self.counts = StoreCounts()

    def read_ahead(self, layer: int, expert: int) -> None:
        """Have the kernel read an expert's part of the files, unless it is here; returns at once.

        Whatever is wrong with it is for `fetch` to tell.
        """
        if (layer, expert) in self.host:
            return
        with suppress(CheckpointError):
            for matrix in MATRICES:
                name = self._names.expert(layer, expert, matrix)
                self._checkpoint.file_of(name).read_ahead(name, self._rows_of(matrix))

    def fetch(
        self, layer: int, expert: int, spare: PackedExpert
    ) -> Generator[None, None, PackedExpert]:
        """Pack one expert in memory, one piece per step, and return where it is.

        That is host memory, where it stays at least until the next fetch, or `spare` without host
        memory. Raises CheckpointError; a fetch that does not finish leaves nothing behind.
        """
        key = (layer, expert)
        held = self.host.get(key, self)
        if held is not None:
            self._count(host_hits=1)
            return held
        memory = self.host.take()
        if memory is None:
            yield from self._fill(layer, expert, spare)
            return spare
        try:
            yield from self._fill(layer, expert, memory)
        except BaseException:
            self.host.give_back(memory)
            raise
        self.host.put(key, memory, self)
        return memory

    def other(self) -> ExpertStore:
        """Return a store of the same experts and host memory, for another thread."""
        return ExpertStore(
            self._checkpoint, self._backend, self._shape, self.host, self._piece_bytes
        )

    def count_trunk(self, num_bytes: int) -> None:
        """Add the bytes that were read from the same files for the trunk."""
        self._count(bytes_read=num_bytes)

    def _count(self, bytes_read: int = 0, disk_reads: int = 0, host_hits: int = 0) -> None:
        now = self.counts
        self.counts = StoreCounts(
            now.bytes_read + bytes_read, now.disk_reads + disk_reads, now.host_hits + host_hits
        )

    def _fill(self, layer: int, expert: int, memory: PackedExpert) -> Iterator[None]:
        memory.wait_until_free()
        self._checkpoint.check_expert(layer, expert)
        width = self._shape.width
        everything = slice(0, self._shape.hidden_size)
        for matrix, out, columns in (
            ("gate", memory.w13[:width], everything),
            ("up", memory.w13[width:], everything),
            ("down", memory.w2, self._part),
        ):
            name = self._names.expert(layer, expert, matrix)
            yield from self._fill_matrix(name, out, self._rows_of(matrix).start, columns)
        self._count(disk_reads=1)

    @property
    def _part(self) -> slice:
        """This rank's part of an expert's width."""
        width = self._shape.width
        return slice(self._shape.rank * width, (self._shape.rank + 1) * width)

    def _rows_of(self, matrix: str) -> slice:
        """Return the rows that this rank reads of a matrix."""
        return slice(0, self._shape.hidden_size) if matrix == "down" else self._part

    def _fill_matrix(
        self, name: str, out: PackedMatrix, first_row: int, columns: slice
    ) -> Iterator[None]:
        """Read and pack rows from `first_row` on; `columns` are this rank's part of them.

        Rows are read whole: a rank's part of a row is smaller than the page the kernel reads.
        """
        file = self._checkpoint.file_of(name)
        row_bytes = file.info(name).num_bytes // file.info(name).shape[0]
        block = self._backend.row_block
        step = max(1, self._piece_bytes // row_bytes // block) * block
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            self._pack_rows(file, name, out[start:stop], first_row + start, columns)
            self._count(bytes_read=(stop - start) * row_bytes)
            yield

    def _pack_rows(
        self, file: TensorFile, name: str, out: PackedMatrix, first_row: int, columns: slice
    ) -> None:
        rows, dtype = slice(first_row, first_row + len(out)), file.dtype(name)
        num_columns = file.info(name).shape[1]
        is_whole = out.values.shape[1] == num_columns
        if self._backend.keeps_layout and is_whole and dtype == out.values.dtype:
            file.read_rows(name, rows, out.values)
            return
        count = len(out) * num_columns
        if dtype not in self._rows or self._rows[dtype].numel() < count:
            self._rows[dtype] = torch.empty(count, dtype=dtype)
        raw = file.read_rows(name, rows, self._rows[dtype][:count].view(len(out), num_columns))
        self._backend.pack_into(out, raw[:, columns])
