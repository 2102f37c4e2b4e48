"""The experts of a layer on a CPU with AVX-512, by a kernel compiled on first use.

The compiler is torch.compile's for CPUs, and so is its cache: a second process loads the library.

Shapes: T tokens, K places a token (top-k), D model dim, F expert dim, S slots.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CpuExperts", "may_use_tiles"]

_SOURCE = Path(__file__).with_name("moe_mlp.cpp")
_TOKENS_AT_ONCE = 2048
"""A longer batch is computed in pieces, so that scratch stays below 150 MiB at EMO's sizes."""

_FLOAT32, _BFLOAT16, _TILES = range(3)  # emo_moe_kernels' bits


def may_use_tiles() -> bool:
    """Ask Linux for the tile registers of AMX, once per process; tell whether there are any.

    A process that uses them unasked ends with SIGILL.
    """
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


class CpuExperts:
    """Experts from packed slots, in float32, or in bfloat16 with sums in float32.

    A token's result does not depend on the tokens beside it. D and F are multiples of 32, and rows
    are packed in multiples of 16.
    """

    def __init__(self, kernel: int) -> None:
        library = _library()
        assert library is not None
        self._library, self._kernel = library, kernel
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, dtype: torch.dtype, *, tiles: bool = True) -> CpuExperts | None:
        """Return the fastest kernel for tokens and weights of this dtype; None without one.

        `tiles=False` leaves AMX aside.
        """
        has_avx512 = platform.machine() == "x86_64" and torch.cpu._is_avx512_supported()
        library = _library() if has_avx512 else None
        if library is None:
            return None
        wanted = {torch.float32: [_FLOAT32], torch.bfloat16: [_TILES, _BFLOAT16]}.get(dtype, [])
        built = library.emo_moe_kernels()
        for kernel in wanted:
            if built >> kernel & 1 and (kernel != _TILES or (tiles and may_use_tiles())):
                return cls(kernel)
        return None

    def pack_into(self, out: Tensor, weight: Tensor) -> None:
        """Write rows of a matrix [N, k] as the kernel reads them; both contiguous, one dtype."""
        rows, bytes_per_row = len(weight), weight[0].nbytes
        self._library.emo_moe_pack(
            _pointer(out), _pointer(weight), *_integers(rows, bytes_per_row // 4)
        )

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D].

        Weights are fp32 and slots int32; a place of weight 0 is not computed. w13 is [S, 2F, D]
        packed, gate rows first, w2 [S, D, F] packed. All are contiguous.
        """
        y_TD = torch.empty_like(x_TD)
        sizes = slots_TK.shape[1], x_TD.shape[1], w2.shape[2], len(w2)
        for first in range(0, len(x_TD), _TOKENS_AT_ONCE):
            piece = slice(first, first + _TOKENS_AT_ONCE)
            x = x_TD[piece]
            scratch = self._scratch_for(len(x), *sizes, x.element_size())
            tensors = y_TD[piece], x, w13, w2, weights_TK[piece], slots_TK[piece]
            self._library.emo_moe(
                self._kernel,
                *map(_pointer, tensors),
                *_integers(len(x), *sizes),
                ctypes.c_void_p(scratch),
            )
        return y_TD

    def _scratch_for(self, *sizes: int) -> int:
        """Return the address of scratch for a batch, aligned to 64; it is kept for the next."""
        needed = self._library.emo_moe_scratch(*_integers(*sizes)) + 64
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return (self._scratch.data_ptr() + 63) // 64 * 64


@cache
def _library() -> ctypes.CDLL | None:
    """Compile and load the kernel; None without a compiler."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(_SOURCE.read_text(), needs_vec_isa=False)
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    assert isinstance(library, ctypes.CDLL)
    library.emo_moe_scratch.restype = ctypes.c_int64
    library.emo_moe.restype = library.emo_moe_pack.restype = None
    return library


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
