"""Routing and the experts of a layer on a CPU with AVX-512, by kernels compiled on first use.

The compiler is torch.compile's for CPUs, and so is its cache: a second process loads the library.

Shapes: T tokens, E experts of the layer, K places a token (top-k), D model dim, F expert dim, S
slots.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from emo_kernels.tables import PoolTables, Routed, Router

__all__ = ["CpuExperts", "may_use_tiles"]

_SOURCES = [Path(__file__).with_name(name) for name in ("moe_mlp.cpp", "routing.cpp")]
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
        self._library.emo_moe_pack(out.data_ptr(), weight.data_ptr(), rows, bytes_per_row // 4)

    def route(
        self, logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router
    ) -> Routed:
        """Choose each token's experts as `emo_kernels.reference.route` does.

        Logits are float32 or bfloat16, of which rows may lie apart; all else is contiguous.
        """
        num_tokens = len(logits_TE)
        weights_TK = torch.empty(num_tokens, router.top_k)
        slots_TK = torch.empty(num_tokens, router.top_k, dtype=torch.int32)
        tensors = (
            *(weights_TK, slots_TK, logits_TE, pool_rows_T.long()),
            *(tables.members_PE, tables.temperatures_P, tables.slot_of_expert_E),
        )
        self._library.emo_route(
            *(tensor.data_ptr() for tensor in tensors),
            (ctypes.c_int32 * len(router.always_active))(*router.always_active),
            *(num_tokens, logits_TE.stride(0), router.num_experts, router.top_k),
            *(router.num_shared, len(router.always_active), router.renormalize),
            logits_TE.dtype == torch.float32,
        )
        return Routed(weights_TK, slots_TK)

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
                *(tensor.data_ptr() for tensor in tensors),
                *(len(x), *sizes),
                scratch,
            )
        return y_TD

    def _scratch_for(self, *sizes: int) -> int:
        """Return the address of scratch for a batch, aligned to 64; it is kept for the next."""
        needed = self._library.emo_moe_scratch(*sizes) + 64
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return (self._scratch.data_ptr() + 63) // 64 * 64


@cache
def _library() -> ctypes.CDLL | None:
    """Compile and load the kernels; None without a compiler."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = "\n".join(path.read_text() for path in _SOURCES)
    try:
        library = CppCodeCache.load(source, needs_vec_isa=False)
    except (CppCompileError, InvalidCxxCompiler, OSError):
        return None
    assert isinstance(library, ctypes.CDLL)
    at, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, result, arguments in (
        ("emo_moe_kernels", number, []),
        ("emo_moe_scratch", size, [size] * 6),
        ("emo_moe", None, [number, *[at] * 6, *[size] * 5, at]),
        ("emo_moe_pack", None, [at, at, size, size]),
        ("emo_route", None, [at] * 8 + [size] * 6 + [number] * 2),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
