"""The two grouped GEMMs of a MoE layer, over the tiles of a schedule.

    gate_up:  for each slot s, rows p of s:  h[p] = silu(x[t] @ gate_s.T) * (x[t] @ up_s.T)
    down:     for each slot s, rows p of s:  rows[r] = weight[r] * (h[p] @ down_s.T)

where r = schedule.rows_R[p] is the routed row at position p and t = r // K its token. Products
accumulate in fp32. A row's value depends neither on its position nor on other rows.

Weights are the LEFT operand of every product: a tile is weights [N, k] times tokens [k, M], the
accumulator [N, M]. The tensor cores of sm_90 and sm_100 want 64 rows or more on the left, and few
tokens meet many weights when decoding; so 16 tokens still fill an instruction. It also lets fp8
weights be widened in registers, where only the left operand may lie.

A program takes tile after tile, so one kernel is both a persistent one (fewer programs than tiles)
and a plain one. The number of tiles is read on the device; programs past it end at once. A slot's
weights are read for the rows that chose it and for nothing else.

Shapes: T tokens, D model dim, F expert dim, S slots, K places a token, R = T * K routed rows. In
the kernels M is routed rows, N weight rows, and k the dimension summed over.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from emo_kernels.tables import Schedule
from emo_kernels.tuning import Tile, choose

__all__ = ["down", "gate_up"]

# fmt: off


@triton.jit
def _place(index, num_m, num_n, GROUP_M: tl.constexpr):
    """Return the (m, n) of a tile: GROUP_M tiles of rows in turn, then the next weights."""
    in_group = GROUP_M * num_n
    first_m = index // in_group * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + index % in_group % height, index % in_group // height


@triton.jit
def _widen(w, DTYPE: tl.constexpr):
    """Return fp8 (e4m3) weights as DTYPE; others have it already."""
    if w.dtype == tl.uint8:  # sm_80 has no e4m3: move its bits to where fp16 has them
        bits = w.to(tl.uint16)
        half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)
        return (half * 256.0).to(DTYPE)  # an exponent of bias 7 was read with bias 15
    return w.to(DTYPE)


@triton.jit
def _load_weights(
    w, row, n, k, num_n, num_k,
    N: tl.constexpr, K: tl.constexpr, EVEN_K: tl.constexpr, USE_TMA: tl.constexpr,
):
    """Load rows n .. n+N-1 of the matrix [num_n, num_k] that begins at `row` of the slab.

    Rows past the matrix are another's; no value that is stored depends on them.
    """
    if USE_TMA:
        w_NK = w.load([row + n, k])  # what lies outside the slab is 0
    else:
        rows_N = row.to(tl.int64) + tl.minimum(n + tl.arange(0, N), num_n - 1)
        ks_K = k + tl.arange(0, K)
        pointers = w + rows_N[:, None] * num_k + ks_K[None, :]
        if EVEN_K:
            w_NK = tl.load(pointers)
        else:
            w_NK = tl.load(pointers, mask=ks_K[None, :] < num_k, other=0)
    return w_NK


@triton.jit
def _load_tokens(x, rows_M, live_M, k, num_k, K: tl.constexpr, EVEN_K: tl.constexpr):
    """Gather [M, K] of x's rows; 0 where a tile has no row."""
    ks_K = k + tl.arange(0, K)
    pointers = x + rows_M.to(tl.int64)[:, None] * num_k + ks_K[None, :]
    mask = live_M[:, None] if EVEN_K else live_M[:, None] & (ks_K[None, :] < num_k)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _gate_up_kernel(
    # x [T, D]; w13 [S, 2F, D], a pointer or a descriptor; scales [S, 2F] or None; h [R, F]
    x, w13, scales, h,
    # the schedule
    rows, offsets, tile_slots, tile_starts, num_tiles,
    # sizes
    D, F, TOP_K: tl.constexpr,
    # tiles
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, USE_TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(F, N)
    for index in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        m, n_tile = _place(index, num_m, num_n, GROUP_M)
        slot = tl.load(tile_slots + m)
        n = n_tile * N
        place_M = tl.load(tile_starts + m) + tl.arange(0, M)
        live_M = place_M < tl.load(offsets + slot + 1)
        token_M = tl.load(rows + place_M, mask=live_M, other=0) // TOP_K
        gate_row = slot * 2 * F
        up_row = gate_row + F
        gate_NM = tl.zeros((N, M), tl.float32)
        up_NM = tl.zeros((N, M), tl.float32)
        for k in range(0, D, K):
            x_KM = _load_tokens(x, token_M, live_M, k, D, K, EVEN_K).T
            gate_NK = _load_weights(w13, gate_row, n, k, F, D, N, K, EVEN_K, USE_TMA)
            up_NK = _load_weights(w13, up_row, n, k, F, D, N, K, EVEN_K, USE_TMA)
            gate_NM = tl.dot(_widen(gate_NK, DTYPE), x_KM, gate_NM, input_precision="ieee")
            up_NM = tl.dot(_widen(up_NK, DTYPE), x_KM, up_NM, input_precision="ieee")
        n_N = n + tl.arange(0, N)
        if scales is not None:
            scale = scales + slot.to(tl.int64) * 2 * F + n_N
            gate_NM *= tl.load(scale, mask=n_N < F, other=0.0)[:, None]
            up_NM *= tl.load(scale + F, mask=n_N < F, other=0.0)[:, None]
        h_NM = gate_NM / (1.0 + tl.exp(-gate_NM)) * up_NM
        tl.store(
            h + place_M.to(tl.int64)[:, None] * F + n_N[None, :],
            h_NM.to(DTYPE).T,
            mask=live_M[:, None] & (n_N < F)[None, :],
        )


@triton.jit
def _down_kernel(
    # h [R, F] and w2 [S, D, F], pointers or descriptors; scales [S, D] or None; weights [R]
    h, w2, scales, weights, out,
    # the schedule
    rows, offsets, tile_slots, tile_starts, num_tiles,
    # sizes
    D, F,
    # tiles
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr, USE_TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    num_m = tl.load(num_tiles)
    num_n = tl.cdiv(D, N)
    for index in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        m, n_tile = _place(index, num_m, num_n, GROUP_M)
        slot = tl.load(tile_slots + m)
        n = n_tile * N
        start = tl.load(tile_starts + m)
        place_M = start + tl.arange(0, M)
        live_M = place_M < tl.load(offsets + slot + 1)
        row = slot * D
        out_NM = tl.zeros((N, M), tl.float32)
        for k in range(0, F, K):
            if USE_TMA:
                h_KM = h.load([start, k]).T  # the next slot's rows too: columns never stored
            else:
                h_KM = _load_tokens(h, place_M, live_M, k, F, K, EVEN_K).T
            w_NK = _load_weights(w2, row, n, k, D, F, N, K, EVEN_K, USE_TMA)
            out_NM = tl.dot(_widen(w_NK, DTYPE), h_KM, out_NM, input_precision="ieee")
        n_N = n + tl.arange(0, N)
        if scales is not None:
            scale_N = tl.load(scales + slot.to(tl.int64) * D + n_N, mask=n_N < D, other=0.0)
            out_NM *= scale_N[:, None]
        row_M = tl.load(rows + place_M, mask=live_M, other=0)
        out_NM *= tl.load(weights + row_M, mask=live_M, other=0.0)[None, :]
        tl.store(
            out + row_M.to(tl.int64)[:, None] * D + n_N[None, :],
            out_NM.to(DTYPE).T,
            mask=live_M[:, None] & (n_N < D)[None, :],
        )


# fmt: on


def gate_up(
    x_TD: Tensor,
    w13: Tensor,
    schedule: Schedule,
    top_k: int,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return h_RF, silu(gate) * up of every routed row, in the schedule's order and x's dtype.

    w13 [S, 2F, D], gate rows, then up rows; float8_e4m3fn with `scales` [S, 2F] fp32, else x's
    dtype. Rows past the schedule's are undefined. Raises ValueError for tensors that do not fit.
    """
    num_slots, two_f, d = w13.shape
    f = two_f // 2
    _check(x_TD, "x_TD", (x_TD.shape[0], d), x_TD)
    _check_slab(w13, "w13", (schedule.num_slots, 2 * f, d), scales, x_TD)
    num_rows = schedule.rows_R.shape[0]
    h_RF = x_TD.new_empty((num_rows, f))
    if num_rows == 0 or f == 0:
        return h_RF
    tile = tile or choose(x_TD.device, x_TD.shape[0], num_slots, w13.dtype, x_TD.dtype).gate_up
    _launch(
        _gate_up_kernel,
        (x_TD, _weights_operand(w13, tile), scales, h_RF),
        schedule,
        (d, f, top_k),
        tile,
        num_n=f,
        num_k=d,
    )
    return h_RF


def down(
    h_RF: Tensor,
    w2: Tensor,
    weights_TK: Tensor,
    schedule: Schedule,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return rows_RD, each routed row's expert output times its weight, in h's dtype.

    h_RF is in the schedule's order, the result in that of the routed rows; rows that took no
    expert are undefined. w2 [S, D, F]; float8_e4m3fn with `scales` [S, D] fp32, else h's dtype.
    """
    num_slots, d, f = w2.shape
    num_rows = schedule.rows_R.shape[0]
    _check(h_RF, "h_RF", (num_rows, f), h_RF)
    _check_slab(w2, "w2", (schedule.num_slots, d, f), scales, h_RF)
    if weights_TK.numel() != num_rows or weights_TK.dtype != torch.float32:
        raise ValueError(
            f"weights_TK is {weights_TK.dtype} of shape {tuple(weights_TK.shape)}; the schedule"
            f" wants float32, {num_rows} in all"
        )
    rows_RD = h_RF.new_empty((num_rows, d))
    if num_rows == 0 or d == 0:
        return rows_RD
    tokens = weights_TK.shape[0]
    tile = tile or choose(h_RF.device, tokens, num_slots, w2.dtype, h_RF.dtype).down
    h = h_RF
    if tile.use_tma:
        h = TensorDescriptor.from_tensor(h_RF, [schedule.block_m, tile.block_k])
    _launch(
        _down_kernel,
        (h, _weights_operand(w2, tile), scales, weights_TK.contiguous(), rows_RD),
        schedule,
        (d, f),
        tile,
        num_n=d,
        num_k=f,
    )
    return rows_RD


# -- launch --


def _launch(
    kernel: Any,
    tensors: tuple[Any, ...],
    schedule: Schedule,
    sizes: tuple[int, ...],
    tile: Tile,
    *,
    num_n: int,
    num_k: int,
) -> None:
    most = schedule.tile_slots.shape[0] * triton.cdiv(num_n, tile.block_n)
    programs = tile.programs_per_sm * _num_processors(schedule.rows_R.device)
    kernel[(min(most, programs or most),)](
        *tensors,
        schedule.rows_R,
        schedule.offsets_S1,
        schedule.tile_slots,
        schedule.tile_starts,
        schedule.num_tiles,
        *sizes,
        M=schedule.block_m,
        N=tile.block_n,
        K=tile.block_k,
        EVEN_K=num_k % tile.block_k == 0,
        GROUP_M=tile.group_m,
        USE_TMA=tile.use_tma,
        WARP_SPECIALIZE=tile.warp_specialize,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


def _weights_operand(w: Tensor, tile: Tile) -> Any:
    """Return what the kernel reads a slab through: a pointer, or a descriptor of all its rows."""
    rows = w.view(-1, w.shape[-1])
    if tile.use_tma:
        return TensorDescriptor.from_tensor(rows, [tile.block_n, tile.block_k])
    if w.dtype == torch.float8_e4m3fn and not _has_fp8(w.device):
        return rows.view(torch.uint8)
    return rows


@cache
def _has_fp8(device: torch.device) -> bool:
    return device.type != "cpu" and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough for programs to take more than one tile
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != like.device:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()} on"
            f" {tensor.device}; wanted {shape}, contiguous, on {like.device}"
        )


def _check_slab(
    slab: Tensor, name: str, shape: tuple[int, ...], scales: Tensor | None, tokens: Tensor
) -> None:
    _check(slab, name, shape, tokens)
    if any(size % 16 for size in shape[1:]):
        raise ValueError(
            f"{name} has shape {shape}; hidden and expert sizes must be multiples of 16"
        )
    is_fp8 = slab.dtype == torch.float8_e4m3fn
    if is_fp8 != (scales is not None) or not (is_fp8 or slab.dtype == tokens.dtype):
        raise ValueError(
            f"{name} is {slab.dtype} {'with' if scales is not None else 'without'} scales, tokens"
            f" are {tokens.dtype}; wanted the tokens' dtype, or float8_e4m3fn with scales"
        )
    if scales is not None:
        _check(scales, f"{name}'s scales", shape[:2], tokens)
        if scales.dtype != torch.float32:
            raise ValueError(f"{name}'s scales are {scales.dtype}; wanted float32")
