"""From the slots that tokens chose to a schedule: rows sorted by slot, and their tiles.

    for slot s:  rows[offsets[s] : offsets[s+1]] = the rows r with slots[r] == s, ascending
                 that stretch is cut into ceil(count / block_m) tiles, numbered from slot 0 on

A counting sort without atomics: a row's place follows from the slots alone, so equal batches give
equal schedules. No stage reads anything back to the host; sizes depend on T, K and S only.

Up to 4096 rows (512 tokens of top-8) it is one kernel, a program a slot: each reads all slot ids,
which stay in L2, counts them (histogram in shared memory) to learn where its slot begins, and a
prefix sum over "is it mine" numbers its rows. One memory trip, one wave, no program waits for
another. The count is done again by every program; a second launch would cost more.

Beyond that, three: counts of each block of 4096 rows; sums over them, one program; then a program
for each slot and block, which ends at once where the block has no row of the slot.

Shapes: T tokens, K places a token, S slots, R = T * K routed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.tables import Schedule

__all__ = ["dispatch"]

_BLOCK_ROWS = 4096  # 8 ids a thread of 16 warps; not tuned
_SUM_TILE = 8192  # counts that _sum_kernel adds at a time; 16384 spill registers at S = 1024

# fmt: off


@triton.jit
def _load_slots(slots, row_R, num_rows, num_slots):
    """Return the rows' slots, -1 for what is no slot."""
    slot_R = tl.load(slots + row_R, mask=row_R < num_rows, other=-1)
    return tl.where((slot_R >= 0) & (slot_R < num_slots), slot_R, -1)


@triton.jit
def _count(slot_R, NUM_BINS: tl.constexpr):
    return tl.histogram(tl.maximum(slot_R, 0), NUM_BINS, mask=slot_R >= 0)


@triton.jit
def _store_rows(rows, begin, row_R, is_mine_R):
    """Store the rows that are mine at rows[begin:], in their order."""
    ones_R = is_mine_R.to(tl.int32)
    tl.store(rows + begin + tl.cumsum(ones_R, 0) - ones_R, row_R, mask=is_mine_R)


@triton.jit
def _store_tiles(tile_slots, tile_starts, slot, begin, count, first_tile, BLOCK_M: tl.constexpr):
    num_tiles = tl.cdiv(count, BLOCK_M)
    for first in range(0, num_tiles, 32):
        tile_N = first + tl.arange(0, 32)
        is_tile_N = tile_N < num_tiles
        tl.store(tile_slots + first_tile + tile_N, slot, mask=is_tile_N)
        tl.store(tile_starts + first_tile + tile_N, begin + tile_N * BLOCK_M, mask=is_tile_N)


@triton.jit(do_not_specialize=["num_rows"])
def _dispatch_kernel(
    # slots [R]; rows [R], offsets [S + 1], tile_slots and tile_starts [most tiles], num_tiles [1]
    slots, rows, offsets, tile_slots, tile_starts, num_tiles,
    # sizes
    num_rows, num_slots,
    # tiles
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, NUM_BINS: tl.constexpr,
):
    slot = tl.program_id(0)
    row_R = tl.arange(0, BLOCK_R)
    bin_S = tl.arange(0, NUM_BINS)
    slot_R = _load_slots(slots, row_R, num_rows, num_slots)
    count_S = _count(slot_R, NUM_BINS)
    before_S = bin_S < slot
    begin = tl.sum(tl.where(before_S, count_S, 0), 0)
    count = tl.sum(tl.where(bin_S == slot, count_S, 0), 0)
    first_tile = tl.sum(tl.where(before_S, tl.cdiv(count_S, BLOCK_M), 0), 0)
    tl.store(offsets + slot, begin)
    if slot == num_slots - 1:
        tl.store(offsets + num_slots, begin + count)
        tl.store(num_tiles, first_tile + tl.cdiv(count, BLOCK_M))
    if count > 0:
        _store_rows(rows, begin, row_R, slot_R == slot)
        _store_tiles(tile_slots, tile_starts, slot, begin, count, first_tile, BLOCK_M)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _count_kernel(
    # slots [R]; counts [S, blocks]
    slots, counts,
    # sizes
    num_rows, num_slots, num_blocks,
    # tiles
    BLOCK_R: tl.constexpr, NUM_BINS: tl.constexpr,
):
    block = tl.program_id(0)
    row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    bin_S = tl.arange(0, NUM_BINS)
    count_S = _count(_load_slots(slots, row_R, num_rows, num_slots), NUM_BINS)
    tl.store(counts + bin_S * num_blocks + block, count_S, mask=bin_S < num_slots)


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_kernel(
    # counts [S, blocks]; offsets [S + 1], first_tiles [S], num_tiles [1]
    counts, offsets, first_tiles, num_tiles,
    # sizes
    num_slots, num_blocks,
    # tiles
    BLOCK_M: tl.constexpr, NUM_BINS: tl.constexpr, BLOCK_B: tl.constexpr,
):
    slot_S = tl.arange(0, NUM_BINS)
    is_slot_S = slot_S < num_slots
    count_S = tl.zeros((NUM_BINS,), tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block_B = first + tl.arange(0, BLOCK_B)
        is_count_SB = is_slot_S[:, None] & (block_B < num_blocks)[None, :]
        count_SB = tl.load(
            counts + slot_S[:, None] * num_blocks + block_B[None, :], mask=is_count_SB, other=0
        )
        count_S += tl.sum(count_SB, 1)
    tiles_S = tl.cdiv(count_S, BLOCK_M)
    tl.store(offsets + slot_S, tl.cumsum(count_S, 0) - count_S, mask=is_slot_S)
    tl.store(first_tiles + slot_S, tl.cumsum(tiles_S, 0) - tiles_S, mask=is_slot_S)
    tl.store(offsets + num_slots, tl.sum(count_S, 0))
    tl.store(num_tiles, tl.sum(tiles_S, 0))


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _place_kernel(
    # slots [R], counts [S, blocks], offsets [S + 1], first_tiles [S]
    slots, counts, offsets, first_tiles,
    # rows [R], tile_slots and tile_starts [most tiles]
    rows, tile_slots, tile_starts,
    # sizes
    num_rows, num_slots, num_blocks,
    # tiles: BLOCK_B is num_blocks or more
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):
    slot = tl.program_id(0)
    block = tl.program_id(1)
    block_B = tl.arange(0, BLOCK_B)
    count_B = tl.load(counts + slot * num_blocks + block_B, mask=block_B <= block, other=0)
    begin = tl.load(offsets + slot)
    if block == 0:
        count = tl.load(offsets + slot + 1) - begin
        first_tile = tl.load(first_tiles + slot)
        _store_tiles(tile_slots, tile_starts, slot, begin, count, first_tile, BLOCK_M)
    if tl.sum(tl.where(block_B == block, count_B, 0), 0) > 0:
        begin += tl.sum(tl.where(block_B < block, count_B, 0), 0)
        row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        slot_R = _load_slots(slots, row_R, num_rows, num_slots)
        _store_rows(rows, begin, row_R, slot_R == slot)


# fmt: on


def dispatch(slots_TK: Tensor, num_slots: int, block_m: int) -> Schedule:
    """Sort routed rows by (slot, row) and cut each slot's rows into tiles of `block_m`.

    slots_TK int32, contiguous; what is not in 0 .. num_slots - 1 takes no expert. block_m is a
    power of two. No host sync. Raises ValueError for arguments that do not fit.
    """
    return _dispatch(slots_TK, num_slots, block_m, _BLOCK_ROWS)


def _dispatch(slots_TK: Tensor, num_slots: int, block_m: int, most_rows: int) -> Schedule:
    """Dispatch, by one kernel where there are no more than `most_rows` rows, else by blocks."""
    _check(slots_TK, num_slots, block_m)
    num_rows = slots_TK.numel()
    most_hit = min(num_slots, num_rows)
    most_tiles = most_hit + (num_rows - most_hit) // block_m
    schedule = Schedule(
        rows_R=slots_TK.new_empty(num_rows),
        offsets_S1=slots_TK.new_empty(num_slots + 1),
        tile_slots=slots_TK.new_empty(most_tiles),
        tile_starts=slots_TK.new_empty(most_tiles),
        num_tiles=slots_TK.new_empty(1),
        block_m=block_m,
    )
    num_bins = max(16, triton.next_power_of_2(num_slots))
    if num_rows > most_rows:
        _launch_blocks(slots_TK, schedule, num_bins, most_rows)
        return schedule
    block_rows = max(128, triton.next_power_of_2(num_rows))
    _dispatch_kernel[(num_slots,)](
        slots_TK,
        schedule.rows_R,
        schedule.offsets_S1,
        schedule.tile_slots,
        schedule.tile_starts,
        schedule.num_tiles,
        num_rows,
        num_slots,
        BLOCK_M=block_m,
        BLOCK_R=block_rows,
        NUM_BINS=num_bins,
        num_warps=min(16, block_rows // 128),
        enable_fp_fusion=True,
    )
    return schedule


def _launch_blocks(slots_TK: Tensor, schedule: Schedule, num_bins: int, block_rows: int) -> None:
    num_rows, num_slots = slots_TK.numel(), schedule.num_slots
    num_blocks = triton.cdiv(num_rows, block_rows)
    counts = slots_TK.new_empty(num_slots * num_blocks)
    first_tiles = slots_TK.new_empty(num_slots)
    _count_kernel[(num_blocks,)](
        slots_TK,
        counts,
        num_rows,
        num_slots,
        num_blocks,
        BLOCK_R=block_rows,
        NUM_BINS=num_bins,
        num_warps=16,
        enable_fp_fusion=True,
    )
    _sum_kernel[(1,)](
        counts,
        schedule.offsets_S1,
        first_tiles,
        schedule.num_tiles,
        num_slots,
        num_blocks,
        BLOCK_M=schedule.block_m,
        NUM_BINS=num_bins,
        BLOCK_B=min(max(1, _SUM_TILE // num_bins), triton.next_power_of_2(num_blocks)),
        num_warps=16,
        enable_fp_fusion=True,
    )
    _place_kernel[(num_slots, num_blocks)](
        slots_TK,
        counts,
        schedule.offsets_S1,
        first_tiles,
        schedule.rows_R,
        schedule.tile_slots,
        schedule.tile_starts,
        num_rows,
        num_slots,
        num_blocks,
        BLOCK_M=schedule.block_m,
        BLOCK_R=block_rows,
        BLOCK_B=triton.next_power_of_2(num_blocks),
        num_warps=8,
        enable_fp_fusion=True,
    )


def _check(slots_TK: Tensor, num_slots: int, block_m: int) -> None:
    if slots_TK.dtype != torch.int32 or slots_TK.dim() != 2 or not slots_TK.is_contiguous():
        raise ValueError(
            f"slots_TK is {slots_TK.dtype} of shape {tuple(slots_TK.shape)} and strides"
            f" {slots_TK.stride()}; wanted torch.int32, two dimensions, contiguous"
        )
    if num_slots < 1:
        raise ValueError(f"num_slots is {num_slots}; wanted 1 or more")
    if block_m < 1 or block_m & (block_m - 1):
        raise ValueError(f"block_m is {block_m}; wanted a power of two")
