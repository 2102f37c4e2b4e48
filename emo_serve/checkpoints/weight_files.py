"""Which file holds each tensor of a checkpoint: by the index, or by the headers of its files."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from emo_serve.checkpoints.json_file import read_object, refuse_value, shown
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.errors import CheckpointError

__all__ = ["find_tensors", "is_left_over", "open_weights"]

_INDEX = "model.safetensors.index.json"

_LEFT_OVER = re.compile(
    r"(.*\.)?("
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(self_attn|attn|attention)\.(bias|masked_bias|causal_mask)"
    r"|position_ids|num_batches_tracked|_extra_state"
    r")"
)
"""Buffers that frameworks save beside weights: rotations, masks and counters, all computed anew."""


def find_tensors(directory: Path) -> tuple[dict[str, Path], list[TensorFile]]:
    """Map each tensor to its file, and return the files that had to be opened for it.

    Raises CheckpointError, naming file, field and value, for an index that is no map of tensors to
    files below the directory, and where there are no weights.
    """
    index = directory / _INDEX
    try:
        weight_map = read_object(index, CheckpointError).get("weight_map")
    except FileNotFoundError:
        return _by_headers(directory)
    if not isinstance(weight_map, dict):
        expected = "an object from tensors to file names"
        raise refuse_value(index, "weight_map", weight_map, expected, CheckpointError)
    files: dict[str, Path] = {}
    known: dict[object, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in known:
            known[str(file)] = _weights_file(directory, index, name, file)
        files[name] = known[file]
    return files, []


def is_left_over(name: str) -> bool:
    """Tell whether a tensor is a buffer of other software, which no model needs to be given."""
    return _LEFT_OVER.fullmatch(name) is not None


def open_weights(path: Path) -> TensorFile:
    """Open one safetensors file; raises CheckpointError naming the file and what is wrong."""
    try:
        return TensorFile(path)
    except RecursionError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _by_headers(directory: Path) -> tuple[dict[str, Path], list[TensorFile]]:
    opened = [open_weights(path) for path in sorted(directory.glob("*.safetensors"))]
    files = {name: file.path for file in opened for name in file.names}
    if not files:
        raise CheckpointError(f"{directory} has no *.safetensors files")
    return files, opened


def _weights_file(directory: Path, index: Path, name: str, file: object) -> Path:
    """Return the path of one entry of the index."""
    field = f"weight_map[{shown(name)}]"
    is_below = isinstance(file, str) and "\0" not in file
    parts = PurePosixPath(file).parts if isinstance(file, str) else ()
    if not is_below or not parts or parts[0] == "/" or ".." in parts:
        expected = f"the name of a file in {directory}"
        raise refuse_value(index, field, file, expected, CheckpointError)
    path = directory.joinpath(*parts)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, or letters that no file name has
        is_file = False
    if not is_file:
        raise CheckpointError(
            f"{index}: {field} names {shown(file)[1:-1]}, which is not in {directory}, or no file"
        )
    return path
