"""The stages of a pool-masked MoE layer in plain torch: the definition the kernels are held to.

Same names and signatures as the kernels, any device, any sizes. Weights are widened to fp32 and
products accumulate there; what a kernel stores is rounded to the tokens' dtype at the same places
(h, the weighted rows, y). Slow on purpose, and `gate_up` and `down` read the offsets on the host.

Shapes: T tokens, D model dim, F expert dim, E experts, P pool rows, S slots, K places a token,
R = T * K routed rows; row r = t * K + k is place k of token t.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from emo_kernels.tables import NO_SLOT, PoolTables, Routed, Router, Schedule

__all__ = ["combine", "dispatch", "down", "gate_up", "pooled_moe", "route"]


def route(logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router) -> Routed:
    """Choose each token's experts inside its pool and say in which slots they sit.

    Experts are taken by descending logit, equal ones by ascending id, which is the softmax's order
    without its rounding; temperatures are positive. Standard experts come first, then the shared;
    always-active ones come before the rest. A place has NO_SLOT and weight 0 where the pool has no
    expert left, the weight is 0 or the expert sits nowhere; a token whose pool row is negative
    takes nothing. A nan among the pool's logits makes its softmax's weights nan.
    """
    num_experts = router.num_experts
    num_standard = num_experts - (0 if router.always_active else router.num_shared)
    forced_ids = router.always_active or range(num_standard, num_experts)
    ids_E = torch.arange(num_experts, device=logits_TE.device)
    forced_N = ids_E.new_tensor(list(forced_ids))
    belongs_E = (ids_E >= num_experts - router.num_shared).index_fill(0, forced_N, True)

    live_T1 = (pool_rows_T >= 0)[:, None]
    rows_T = pool_rows_T.clamp_min(0).long()
    pool_TE = (tables.members_PE[rows_T] | belongs_E) & live_T1
    scaled_TE = logits_TE.float() / tables.temperatures_P[rows_T, None]
    weights_TE = _softmax(scaled_TE, pool_TE & (ids_E < num_standard))
    if not router.always_active:
        weights_TE += _softmax(scaled_TE, pool_TE & (ids_E >= num_standard))

    others_TE = pool_TE.index_fill(1, forced_N, False)
    by_logit_TE = _descending(logits_TE.float())
    others_first_TE = _descending(others_TE.gather(1, by_logit_TE).int())
    chosen_TK = by_logit_TE.gather(1, others_first_TE)[:, : router.top_k - len(forced_N)]
    chosen_weights_TK = weights_TE.masked_fill(~others_TE, 0.0).gather(1, chosen_TK)
    forced_TN = forced_N.expand(len(logits_TE), -1)
    pairs = [(chosen_TK, chosen_weights_TK), (forced_TN, weights_TE.gather(1, forced_TN))]
    if router.always_active:
        pairs.reverse()
    experts_TK = torch.cat([experts for experts, _ in pairs], -1)
    weights_TK = torch.cat([weights for _, weights in pairs], -1)

    slots_TK = tables.slot_of_expert_E[experts_TK].int()
    none_TK = (weights_TK == 0) | (slots_TK < 0)
    if router.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routed(weights_TK.masked_fill(none_TK, 0.0), slots_TK.masked_fill(none_TK, NO_SLOT))


def _descending(values_TE: Tensor) -> Tensor:
    """Return the order from the greatest value, nan, to the least; equal ones as they come."""
    return values_TE.argsort(stable=True, dim=-1, descending=True)


def _softmax(logits_TE: Tensor, among_TE: Tensor) -> Tensor:
    """Return the softmax over the experts in `among_TE`, 0 elsewhere."""
    weights_TE = logits_TE.masked_fill(~among_TE, float("-inf")).softmax(-1)
    return weights_TE.masked_fill(~among_TE, 0.0)  # over nothing it is nan


def dispatch(slots_TK: Tensor, num_slots: int, block_m: int) -> Schedule:
    """Sort routed rows by (slot, row) and cut each slot's rows into tiles of `block_m`."""
    slots_R = slots_TK.reshape(-1).long()
    past_R = (slots_R < 0) | (slots_R >= num_slots)
    slots_R = slots_R.masked_fill(past_R, num_slots)
    counts_S = slots_R.new_zeros(num_slots + 1)
    counts_S = counts_S.scatter_add(0, slots_R, torch.ones_like(slots_R))[:num_slots]
    offsets_S1 = F.pad(counts_S.cumsum(0), (1, 0))
    tile_ends_S = ((counts_S + block_m - 1) // block_m).cumsum(0)
    num_rows, most_hit = len(slots_R), min(num_slots, len(slots_R))
    tiles = torch.arange(most_hit + (num_rows - most_hit) // block_m, device=slots_TK.device)
    tile_slots = torch.searchsorted(tile_ends_S, tiles, right=True).clamp_max(num_slots - 1)
    first_tile_S = F.pad(tile_ends_S, (1, -1))
    tile_starts = offsets_S1[tile_slots] + (tiles - first_tile_S[tile_slots]) * block_m
    return Schedule(
        rows_R=slots_R.argsort(stable=True).int(),
        offsets_S1=offsets_S1.int(),
        tile_slots=tile_slots.int(),
        tile_starts=tile_starts.int(),
        num_tiles=tile_ends_S[-1:].int(),
        block_m=block_m,
    )


def gate_up(
    x_TD: Tensor,
    w13: Tensor,
    schedule: Schedule,
    top_k: int,
    scales: Tensor | None = None,
    tile: object = None,
) -> Tensor:
    """Return h_RF, silu(x @ gate.T) * (x @ up.T) of each routed row, in the schedule's order.

    w13 [S, 2F, D] holds gate rows, then up rows; float8_e4m3fn with `scales` [S, 2F]. Rows past
    the schedule's are 0; `tile` is the kernel's.
    """
    h_RF = x_TD.new_zeros(schedule.rows_R.shape[0], w13.shape[1] // 2)
    for slot, places in _rows_by_slot(schedule):
        tokens = schedule.rows_R[places] // top_k
        gate, up = (x_TD[tokens].float() @ _widen(w13, scales, slot).t()).chunk(2, -1)
        h_RF[places] = (F.silu(gate) * up).to(x_TD.dtype)
    return h_RF


def down(
    h_RF: Tensor,
    w2: Tensor,
    weights_TK: Tensor,
    schedule: Schedule,
    scales: Tensor | None = None,
    tile: object = None,
) -> Tensor:
    """Return rows_RD, weight * (h @ w2.T) by routed row, rounded to h's dtype.

    w2 [S, D, F]; float8_e4m3fn with `scales` [S, D]. Rows that take no expert are 0; `tile` is the
    kernel's.
    """
    rows_RD = h_RF.new_zeros(schedule.rows_R.shape[0], w2.shape[1])
    for slot, places in _rows_by_slot(schedule):
        rows = schedule.rows_R[places]
        out = h_RF[places].float() @ _widen(w2, scales, slot).t()
        rows_RD[rows] = (out * weights_TK.reshape(-1)[rows, None]).to(h_RF.dtype)
    return rows_RD


def combine(rows_RD: Tensor, slots_TK: Tensor) -> Tensor:
    """Return y_TD, each token's places summed in their order and in fp32; NO_SLOT adds nothing."""
    num_tokens, num_places = slots_TK.shape
    rows_TKD = rows_RD.view(num_tokens, num_places, rows_RD.shape[1])
    y_TD = rows_RD.new_zeros((num_tokens, rows_RD.shape[1]), dtype=torch.float32)
    for place in range(num_places):
        nothing_T1 = (slots_TK[:, place] < 0)[:, None]
        y_TD += rows_TKD[:, place].float().masked_fill(nothing_T1, 0.0)
    return y_TD.to(rows_RD.dtype)


def pooled_moe(
    x_TD: Tensor,
    logits_TE: Tensor,
    pool_rows_T: Tensor,
    tables: PoolTables,
    router: Router,
    w13: Tensor,
    w2: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    config: object = None,
) -> Tensor:
    """Return y_TD: each token's experts inside its pool, weighted and summed.

    w13 [S, 2F, D] and w2 [S, D, F]; `scales` are theirs ([S, 2F] and [S, D] fp32) where they are
    float8_e4m3fn. `config` is the kernels'.
    """
    w13_scales, w2_scales = scales or (None, None)
    routed = route(logits_TE, pool_rows_T, tables, router)
    schedule = dispatch(routed.slots_TK, w13.shape[0], block_m=16)
    h_RF = gate_up(x_TD, w13, schedule, router.top_k, w13_scales)
    return combine(down(h_RF, w2, routed.weights_TK, schedule, w2_scales), routed.slots_TK)


def _rows_by_slot(schedule: Schedule) -> Iterator[tuple[int, slice]]:
    """Yield each slot that was hit, with the places of its rows in the schedule's order."""
    offsets = schedule.offsets_S1.tolist()  # sync: how many rows each slot has
    for slot, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if begin < end:
            yield slot, slice(begin, end)


def _widen(slab: Tensor, scales: Tensor | None, slot: int) -> Tensor:
    weights = slab[slot].float()
    return weights if scales is None else weights * scales[slot, :, None]
