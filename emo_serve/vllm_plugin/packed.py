"""Weights as slots hold them: in the slab's dtype and layout, in fp8 with scales beside them.

Each scale belongs to one row of a matrix, so rows of weights always travel with their scales. Only
the backend looks at the contents. Weights on their way to a slot have the same form.

Shapes: D hidden size, F expert width on this rank, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emo_serve.vllm_plugin.contract import EXPERT_DTYPES, expert_bytes

__all__ = ["ExpertShape", "PackedExpert", "PackedMatrix", "Slab"]

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Rows of one expert's matrix [N, k], or of all slots' [S, N, k]; in fp8 one scale per row.

    `scales` are fp32, [N] or [S, N]; the weights are values * scales.
    """

    values: Tensor
    scales: Tensor | None = None

    def __getitem__(self, part: int | slice) -> PackedMatrix:
        """Return one slot of a slab, or some rows of a matrix, as a view of the same memory."""
        return PackedMatrix(self.values[part], None if self.scales is None else self.scales[part])

    def __len__(self) -> int:
        return len(self.values)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that a copy must cover."""
        return (self.values,) if self.scales is None else (self.values, self.scales)


@dataclass(eq=False)
class PackedExpert:
    """Memory for one packed expert: w13 [2F, D], gate rows before up rows, and w2 [D, F].

    `in_flight` is the event after the last copy that reads this memory; the code that copies from
    it sets the event.
    """

    w13: PackedMatrix
    w2: PackedMatrix
    in_flight: torch.cuda.Event | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every tensor that a copy must cover, in the same order for every expert."""
        return (*self.w13.tensors(), *self.w2.tensors())

    @property
    def num_bytes(self) -> int:
        """Return the bytes of this memory."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def wait_until_free(self) -> None:
        """Wait for the last copy that reads this memory."""
        if self.in_flight is not None:
            self.in_flight.synchronize()
            self.in_flight = None


@dataclass(frozen=True, eq=False)
class Slab:
    """All slots of one layer: w13 [S, 2F, D] and w2 [S, D, F]."""

    w13: PackedMatrix
    w2: PackedMatrix

    def slot(self, number: int) -> PackedExpert:
        """Return the memory of one slot."""
        return PackedExpert(self.w13[number], self.w2[number])


@dataclass(frozen=True)
class ExpertShape:
    """One rank's part of an expert: its sizes, its dtype in the slab, and which part it is."""

    hidden_size: int
    width: int
    dtype: torch.dtype
    rank: int = 0

    @property
    def num_bytes(self) -> int:
        """Return the bytes of this part of an expert, including scales."""
        auto, fp8 = EXPERT_DTYPES
        expert_dtype = fp8 if self._is_fp8 else auto
        return expert_bytes(self.hidden_size, self.width, expert_dtype, self.dtype.itemsize)

    def view(self, memory: Tensor) -> PackedExpert:
        """Return `num_bytes` of memory as an expert's matrices, values before scales."""
        values = [rows * columns * self.dtype.itemsize for rows, columns in self._matrices]
        scales = [rows * torch.float32.itemsize for rows, _ in self._matrices if self._is_fp8]
        parts = memory.split([*values, *scales])
        w13, w2 = (
            PackedMatrix(
                parts[i].view(self.dtype).view(shape),
                parts[i + 2].view(torch.float32) if self._is_fp8 else None,
            )
            for i, shape in enumerate(self._matrices)
        )
        return PackedExpert(w13, w2)

    def slab(self, num_slots: int) -> Slab:
        """Allocate slots of zeros on the default device."""
        w13, w2 = (
            PackedMatrix(
                torch.zeros(num_slots, *shape, dtype=self.dtype),
                torch.ones(num_slots, shape[0], dtype=torch.float32) if self._is_fp8 else None,
            )
            for shape in self._matrices
        )
        return Slab(w13, w2)

    @property
    def _matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (2 * self.width, self.hidden_size), (self.hidden_size, self.width)

    @property
    def _is_fp8(self) -> bool:
        return self.dtype == _FP8
