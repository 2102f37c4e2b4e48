"""One MoE layer out of its stages: route, dispatch, gate_up, down, combine; five launches.

Every buffer's size follows from shapes, nothing waits for the device, and no result depends on
the order in which programs run: so a call can be captured in a CUDA graph, replayed with other
tables, and gives the same bits each time.

Shapes: T tokens, D model dim, F expert dim, E experts, P pool rows, S slots, K places a token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.dispatch import dispatch
from emo_kernels.grouped_gemm import down, gate_up
from emo_kernels.routing import route
from emo_kernels.tables import PoolTables, Router
from emo_kernels.tuning import Config, choose

__all__ = ["combine", "pooled_moe"]

_BLOCK_D = 512  # columns a program sums: 4 programs a token of EMO's, all of them short

# fmt: off


@triton.jit
def _combine_kernel(
    rows, slots, y,
    D, K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        row = token * K + k
        width = tl.where(tl.load(slots + row) >= 0, D, 0)  # nothing of a row not written
        part = tl.load(rows + row * D + columns, mask=columns < width, other=0.0)
        total += part.to(tl.float32)
    tl.store(y + token * D + columns, total.to(y.dtype.element_ty), mask=columns < D)


# fmt: on


def combine(rows_RD: Tensor, slots_TK: Tensor) -> Tensor:
    """Return y_TD: the sum over a token's places, in their order, in fp32, then in rows' dtype.

    Rows of places that took no expert are not read. There is no faster, unordered mode: adding
    with atomics would need a buffer of zeros before and a cast after.
    """
    num_tokens, k = slots_TK.shape
    if rows_RD.dim() != 2 or rows_RD.shape[0] != num_tokens * k or not rows_RD.is_contiguous():
        raise ValueError(
            f"rows_RD has shape {tuple(rows_RD.shape)}; slots_TK {tuple(slots_TK.shape)} want"
            f" {num_tokens * k} contiguous rows"
        )
    d = rows_RD.shape[1]
    y_TD = rows_RD.new_empty((num_tokens, d))
    if y_TD.numel():
        grid = (num_tokens, triton.cdiv(d, _BLOCK_D))
        _combine_kernel[grid](
            rows_RD, slots_TK.contiguous(), y_TD, d, k, _BLOCK_D, num_warps=2, enable_fp_fusion=True
        )
    return y_TD


def pooled_moe(
    x_TD: Tensor,
    logits_TE: Tensor,
    pool_rows_T: Tensor,
    tables: PoolTables,
    router: Router,
    w13: Tensor,
    w2: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> Tensor:
    """Return y_TD: each token's experts, chosen within its pool, computed and mixed.

    pool_rows_T says which row of `tables` a token routes in; below 0 it is padding, whose y is 0.
    w13 [S, 2F, D] holds gate rows, then up rows; w2 [S, D, F]; both of x's dtype (bf16, fp16,
    fp32), or float8_e4m3fn with `scales` ([S, 2F], [S, D]) fp32. Work and bytes follow the slots
    that the tokens chose. Every slot that a pool row can reach must hold its expert until the call
    has run. Raises ValueError for tensors that do not fit together.
    """
    num_slots = w13.shape[0]
    if config is None:
        config = choose(x_TD.device, x_TD.shape[0], num_slots, w13.dtype, x_TD.dtype)
    scales_13, scales_2 = scales or (None, None)
    routed = route(logits_TE, pool_rows_T, tables, router)
    schedule = dispatch(routed.slots_TK, num_slots, config.block_m)
    h_RF = gate_up(x_TD, w13, schedule, router.top_k, scales_13, config.gate_up)
    rows_RD = down(h_RF, w2, routed.weights_TK, schedule, scales_2, config.down)
    return combine(rows_RD, routed.slots_TK)
