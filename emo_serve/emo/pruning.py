"""The tensors of a checkpoint that keeps some experts of another; read while they are written.

Gate rows and experts are sliced to the ids kept and renumbered in order; every other tensor is
copied. A router temperature goes into the gate: rows divided by t give logits / t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emo_serve.checkpoints.shards import NewTensor
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.tensor_names import expert_tensor_name, gate_name

__all__ = ["kept_tensors", "scaled_gate_dtype"]

_PIECE_BYTES = 64 * 2**20


def kept_tensors(
    checkpoint: Checkpoint, expert_ids: Sequence[Sequence[int]], temperature: float = 1.0
) -> list[NewTensor]:
    """Return the tensors of the smaller checkpoint, in the order of the source's files.

    `expert_ids` are the ids kept per layer, ascending, empty for a dense one. Reads headers only;
    raises CheckpointError for tensors that are missing or of another shape or dtype.
    """
    checkpoint.check_experts((layer, e) for layer, ids in enumerate(expert_ids) for e in ids)
    gates = {gate_name(layer): layer for layer, ids in enumerate(expert_ids) if ids}
    tensors: list[tuple[str, NewTensor]] = []
    for name in checkpoint.trunk_names():
        if name in gates:
            layer = gates[name]
            tensors.append((name, _gate(checkpoint, layer, list(expert_ids[layer]), temperature)))
        else:
            tensors.append((name, _copy(checkpoint, name, name)))
    for layer, ids in enumerate(expert_ids):
        for new_id, expert in enumerate(ids):
            for matrix in ("gate", "up", "down"):
                name = expert_tensor_name(layer, expert, matrix)
                new_name = expert_tensor_name(layer, new_id, matrix)
                tensors.append((name, _copy(checkpoint, name, new_name)))
    return [tensor for name, tensor in sorted(tensors, key=lambda t: _place(checkpoint, t[0]))]


def scaled_gate_dtype(dtype: torch.dtype, temperature: float) -> torch.dtype:
    """Return a dtype that holds gates of `dtype`, divided by the temperature, without rounding.

    A power of two changes only a bfloat16's exponent; float16 has too few exponents for that.
    """
    is_power_of_two = math.frexp(temperature)[0] == 0.5
    if temperature == 1.0 or (is_power_of_two and dtype != torch.float16):
        return dtype
    return torch.float32


def _place(checkpoint: Checkpoint, name: str) -> tuple[str, int]:
    file = checkpoint.file_of(name)
    return file.path.name, file.info(name).start


def _copy(checkpoint: Checkpoint, name: str, new_name: str) -> NewTensor:
    file = checkpoint.file_of(name)
    shape, dtype = file.info(name).shape, file.dtype(name)

    def pieces() -> Iterator[Tensor]:
        if not shape:
            yield file.read(name)
            return
        rows = max(1, _PIECE_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, shape[0], rows):
            yield file.read_rows(name, slice(start, start + rows))

    return NewTensor(new_name, dtype, shape, pieces)


def _gate(checkpoint: Checkpoint, layer: int, ids: list[int], temperature: float) -> NewTensor:
    name = gate_name(layer)
    file = checkpoint.file_of(name)
    dtype = scaled_gate_dtype(file.dtype(name), temperature)

    def pieces() -> Iterator[Tensor]:
        rows = file.read(name)[ids]
        yield rows if temperature == 1.0 else (rows.float() / temperature).to(dtype)

    return NewTensor(name, dtype, (len(ids), file.info(name).shape[1]), pieces)
