"""Write safetensors files of any size, one piece of a tensor at a time.

The safetensors library needs every tensor of a file in memory. Here a tensor is a shape, a dtype
and a function that returns its rows in pieces, called when the tensor is written; the header needs
only shapes. Inside a file the widest dtype comes first, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

__all__ = ["NewTensor", "write_shards"]

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `pieces` gives its rows in order, all of this dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Return the bytes the tensor takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    directory: Path, tensors: Sequence[NewTensor], shard_bytes: int | None
) -> list[Path]:
    """Write the tensors and return the files.

    Without `shard_bytes` all go into `model.safetensors`. With it, they go into numbered files of
    at most that many bytes of weights (or one larger tensor), with an index. Raises OSError.
    """
    if shard_bytes is None:
        path = directory / "model.safetensors"
        _write_file(path, tensors)
        return [path]
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    shards = list(split.filename_to_tensors.values())
    paths = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):  # the library gives a single file no number
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path, [by_name[name] for name in names])
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
    index = {"metadata": split.metadata, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2)
    (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return paths


def _write_file(path: Path, tensors: Iterable[NewTensor]) -> None:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.num_bytes
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            written = sum(_write_piece(file.write, tensor, piece) for piece in tensor.pieces())
            assert written == tensor.num_bytes, f"{tensor.name}: {written} of {tensor.num_bytes}"
        file.flush()
        os.fsync(file.fileno())


def _write_piece(write: Callable[[memoryview], int], tensor: NewTensor, piece: Tensor) -> int:
    assert piece.dtype == tensor.dtype, f"{tensor.name}: a piece of {piece.dtype}"
    if not piece.numel():
        return 0
    return write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
