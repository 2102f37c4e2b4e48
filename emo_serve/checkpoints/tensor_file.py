"""One safetensors file, read with pread.

The usual way is to map the file. We do not, for three reasons. A mapped file that is truncated
while the server runs is a SIGBUS, the end of the process; a short pread is an error on one read.
pread fills a buffer the caller owns, pinned memory for one, without a second copy. And it releases
the interpreter for as long as the disk takes. It has no position, so threads may share a file.

The header (8 bytes of length, then JSON) is checked in full when the file is opened: every tensor's
bytes follow from its dtype and shape, and together they fill the file without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_serve.errors import CheckpointError

__all__ = ["TensorFile", "TensorInfo"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ITEMSIZES = {
    **{name: dtype.itemsize for name, dtype in _DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
_ADVICE_BYTES = 128 << 10  # Linux's usual read-ahead; less than any device's largest request
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; `start` is its first byte in the file."""

    dtype_name: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFile:
    """An open safetensors file. Safe for use by several threads; closed when nobody holds it.

    Raises CheckpointError naming the file and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        self._size = status.st_size
        self._identity = _identity(status)
        self._tensors = self._read_header()

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all tensors in the file."""
        return frozenset(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of a tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} does not hold tensor {name}") from None

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; raises for one that no weight may have."""
        dtype_name = self.info(name).dtype_name
        if dtype_name not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is {dtype_name}, expected {', '.join(_DTYPES)}"
            )
        return _DTYPES[dtype_name]

    def check(self) -> None:
        """Raise if the file was removed, replaced or written to since it was opened; no reads."""
        try:
            states = (os.fstat(self._fd), os.stat(self.path))
        except OSError as error:
            raise CheckpointError(f"{self.path} is gone: {error.strerror}") from error
        for status in states:
            if status.st_size != self._size:
                raise CheckpointError(
                    f"{self.path} has {status.st_size} bytes; it had {self._size} when it was"
                    " opened; restore the file and restart"
                )
            if _identity(status) != self._identity:
                raise CheckpointError(
                    f"{self.path} was replaced or written to since it was opened; restart to serve"
                    " the new file"
                )

    def read(self, name: str) -> Tensor:
        """Read one whole tensor."""
        tensor = torch.empty(self.info(name).shape, dtype=self.dtype(name))
        self._fill(name, tensor, self.info(name).start)
        return tensor

    def read_ahead(self, name: str, rows: slice) -> None:
        """Have the kernel read rows into its page cache, and return at once; a hint only.

        In parts, since Linux cuts what one call asks for to what the device reads ahead.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        info = self.info(name)
        start, stop, _ = rows.indices(info.shape[0])
        row_bytes = info.num_bytes // max(1, info.shape[0])
        for begin in range(start * row_bytes, stop * row_bytes, _ADVICE_BYTES):
            size = min(_ADVICE_BYTES, stop * row_bytes - begin)
            with suppress(OSError):
                os.posix_fadvise(self._fd, info.start + begin, size, os.POSIX_FADV_WILLNEED)

    def read_rows(self, name: str, rows: slice, out: Tensor | None = None) -> Tensor:
        """Read rows `start:stop` of the first dimension, into `out` if given, and nothing else.

        `out` must be contiguous, of the tensor's dtype and of the part's shape.
        """
        info = self.info(name)
        start, stop, step = rows.indices(info.shape[0])
        assert step == 1
        shape = (max(0, stop - start), *info.shape[1:])
        dtype = self.dtype(name)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        assert out.is_contiguous() and out.dtype == dtype and out.shape == shape
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        self._fill(name, out, info.start + start * row_bytes)
        return out

    # -- bytes --

    def _fill(self, name: str, out: Tensor, start: int) -> None:
        if not out.numel():
            return
        target = out.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {name} cannot be read: {error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: {name} ends after {done} of {len(target)} bytes; the file was"
                    f" truncated"
                )
            done += count

    def _read_header(self) -> dict[str, TensorInfo]:
        length = int.from_bytes(self._pread(8, 0), "little")
        if length > min(_MOST_HEADER_BYTES, self._size - 8):
            raise self._broken(f"its header should have {length} bytes and the file {self._size}")
        try:
            header = json.loads(self._pread(length, 8))
        except ValueError as error:  # JSON's and UTF-8's errors are both
            raise self._broken(f"its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        header.pop("__metadata__", None)
        tensors = {name: self._parse(name, entry, 8 + length) for name, entry in header.items()}
        self._check_layout(tensors, 8 + length)
        return tensors

    def _parse(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        try:
            dtype_name, shape = entry["dtype"], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(f"the header's entry of {name} is {entry}") from error
        is_sane = isinstance(dtype_name, str) and all(map(_is_size, (*shape, start, stop)))
        if not is_sane or start > stop:
            raise self._broken(f"the header's entry of {name} is {entry}")
        itemsize = _ITEMSIZES.get(dtype_name)
        if itemsize is not None and stop - start != math.prod(shape) * itemsize:
            raise self._broken(
                f"{name}, {dtype_name} {list(shape)}, has {stop - start} bytes, expected"
                f" {math.prod(shape) * itemsize}"
            )
        return TensorInfo(dtype_name, shape, data_start + start, stop - start)

    def _check_layout(self, tensors: dict[str, TensorInfo], data_start: int) -> None:
        """Tensors must follow each other from the header to the file's end, as the format says."""
        end = data_start
        for name, info in sorted(tensors.items(), key=_place):
            if info.start != end:
                raise self._broken(f"{name} starts at byte {info.start}, expected {end}")
            end += info.num_bytes
        if end != self._size:
            raise self._broken(f"its tensors end at byte {end}, the file has {self._size}")

    def _pread(self, count: int, start: int) -> bytes:
        try:
            data = os.pread(self._fd, count, start)
        except OSError as error:  # a directory, for one
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(data) != count:
            raise self._broken(f"it ends after {start + len(data)} bytes, inside its header")
        return data

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a whole safetensors file: {reason}")


def _place(item: tuple[str, TensorInfo]) -> tuple[int, int]:
    return item[1].start, item[1].num_bytes  # an empty tensor stands before its neighbour


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
