"""Routing inside a pool: gate logits -> each token's weights and slots, in one kernel.

    for each token t, of pool row p:
        z = logits[t] / temperature[p];  S = the standard experts of members[p]
        take the greatest logits of S (ties: the lower id), weight = softmax(z over S)
        take the shared experts, weight = softmax(z over them);  slot = slot_of_expert[expert]
    with always-active experts: S is the whole pool, taken first; no softmax of the shared.

One warp a token. When decoding, what counts is the chain of dependent memory trips, and there are
two: the pool row, then what it selects; logits and slots are read beside the first. Top-k is K
rounds of two warp-wide integer reductions that touch no shared memory and need no barrier: logits
become integers of the same order, so one reduction finds the greatest and another the lowest id
that has it. The id carries its slot in its low bits, and the weight is computed from the winning
logit, so nothing is gathered afterwards. 256 tokens are 256 one-warp programs: a single wave.

Choosing by logit, not by softmax, costs no accuracy (one is monotonic in the other) and makes the
choice a matter of comparisons alone: exact, whatever the device's exp and division round to.

Shapes: T tokens, E experts of the layer, P pool rows, K places a token (the router's top_k).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.tables import PoolTables, Routed, Router

__all__ = ["route"]

_MAX_EXPERTS = 1 << 15  # an id shares 31 bits with its slot
_NONE = tl.constexpr(-(2**31))  # below the key of every logit
_NAN = tl.constexpr(2**31 - 1)  # above it: nan comes first, as in torch

# fmt: off


@triton.jit
def _key(logit):
    """Return an int32 of the same order as the fp32 logit; both zeros are equal."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return tl.where(logit != logit, _NAN, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _logit(key):
    """Return the logit that has this key; nan for _NONE."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _softmax_terms(z_E, key_E, temperature):
    """Return (top, total) so that softmax(z) = exp(z - top) / total, over the keys not _NONE."""
    first = tl.max(key_E, 0)
    top = tl.where(first == _NONE, 0.0, _logit(first)) / temperature
    terms_E = tl.exp(tl.where(key_E == _NONE, float("-inf"), z_E - top))
    return top, tl.where(first == _NONE, 1.0, tl.sum(terms_E, 0))


@triton.jit
def _route_kernel(
    # logits [T, E], pool_rows [T], members [P, E], temperatures [P], slot_of_expert [E]
    logits, pool_rows, members, temperatures, slot_of_expert,
    # weights [T, K], slots [T, K]
    weights, slots,
    # strides between rows
    logits_stride, members_stride,
    # the layer's rule; ALWAYS is a tuple of ids
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr,
    ALWAYS: tl.constexpr, NUM_ALWAYS: tl.constexpr, RENORMALIZE: tl.constexpr,
    # tiles: powers of two
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    id_E = tl.arange(0, BLOCK_E)
    place_K = tl.arange(0, BLOCK_K)
    exists_E = id_E < NUM_EXPERTS

    pool_row = tl.load(pool_rows + token).to(tl.int64)
    logit_E = tl.load(logits + token * logits_stride + id_E, mask=exists_E, other=0.0)
    slot_E = tl.load(slot_of_expert + id_E, mask=exists_E, other=-1)
    live = pool_row >= 0  # tokens that pad a batch have no pool
    pool_row = tl.maximum(pool_row, 0)
    member_E = tl.load(members + pool_row * members_stride + id_E, mask=exists_E, other=0) != 0
    temperature = tl.load(temperatures + pool_row)

    is_shared_E = id_E >= NUM_EXPERTS - NUM_SHARED
    is_always_E = id_E < 0
    for n in tl.static_range(NUM_ALWAYS):
        is_always_E |= id_E == ALWAYS[n]
    pool_E = (member_E | is_shared_E | is_always_E) & exists_E & live
    logit_E = logit_E.to(tl.float32)
    z_E = logit_E / temperature
    key_E = tl.where(pool_E, _key(logit_E), _NONE)
    code_E = id_E << 16 | (slot_E + 1)

    # Places before NUM_ALWAYS hold always-active experts, those from `end` on the shared.
    end: tl.constexpr = TOP_K if NUM_ALWAYS > 0 else TOP_K - NUM_SHARED
    softmax_E = tl.where(is_shared_E, _NONE, key_E) if NUM_ALWAYS == 0 else key_E
    top, total = _softmax_terms(z_E, softmax_E, temperature)
    left_E = softmax_E  # always-active ones leave it as they are taken

    best_K = tl.full((BLOCK_K,), _NONE, tl.int32)
    code_K = tl.zeros((BLOCK_K,), tl.int32)
    for place in tl.static_range(TOP_K):
        if place < NUM_ALWAYS:
            among_E = tl.where(id_E == ALWAYS[place], key_E, _NONE)
        elif place >= end:
            among_E = tl.where(id_E == NUM_EXPERTS - TOP_K + place, key_E, _NONE)
        else:
            among_E = left_E
        best = tl.max(among_E, 0)
        code = tl.min(tl.where(among_E == best, code_E, 0x7FFFFFFF), 0)
        left_E = tl.where(code_E == code, _NONE, left_E)
        best_K = tl.where(place_K == place, best, best_K)
        code_K = tl.where(place_K == place, code, code_K)

    weight_K = tl.exp(_logit(best_K) / temperature - top) / total
    if end < TOP_K:
        top, total = _softmax_terms(z_E, tl.where(is_shared_E, key_E, _NONE), temperature)
        shared_K = tl.exp(_logit(best_K) / temperature - top) / total
        weight_K = tl.where(place_K >= end, shared_K, weight_K)
    weight_K = tl.where(best_K == _NONE, 0.0, weight_K)
    slot_K = (code_K & 0xFFFF) - 1
    nothing_K = (weight_K == 0.0) | (slot_K < 0)
    if RENORMALIZE:
        weight_K /= tl.maximum(tl.sum(weight_K, 0), 1e-20)
    out_K = token * TOP_K + place_K
    tl.store(weights + out_K, tl.where(nothing_K, 0.0, weight_K), mask=place_K < TOP_K)
    tl.store(slots + out_K, tl.where(nothing_K, -1, slot_K), mask=place_K < TOP_K)


# fmt: on


def route(logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router) -> Routed:
    """Choose each token's experts inside its pool and say in which slots they sit.

    logits_TE bf16, fp16 or fp32, rows any distance apart; pool_rows_T int32 or int64, below P,
    negative for a token that takes nothing. Standard experts come first, by descending logit, then
    the shared; always-active ones come before the rest. A place has NO_SLOT and weight 0 where the
    pool has no expert left, the weight is 0 or the expert sits nowhere. A nan among the pool's
    logits makes its softmax's weights nan, its slots stay those of experts. No host sync. Raises
    ValueError for tensors that do not fit.
    """
    _check(logits_TE, pool_rows_T, tables, router)
    num_tokens = logits_TE.shape[0]
    weights_TK = logits_TE.new_empty((num_tokens, router.top_k), dtype=torch.float32)
    slots_TK = logits_TE.new_empty((num_tokens, router.top_k), dtype=torch.int32)
    if num_tokens == 0:
        return Routed(weights_TK, slots_TK)
    _route_kernel[(num_tokens,)](
        logits_TE,
        pool_rows_T,
        tables.members_PE,
        tables.temperatures_P,
        tables.slot_of_expert_E,
        weights_TK,
        slots_TK,
        logits_TE.stride(0),
        tables.members_PE.stride(0),
        NUM_EXPERTS=router.num_experts,
        TOP_K=router.top_k,
        NUM_SHARED=router.num_shared,
        ALWAYS=router.always_active,
        NUM_ALWAYS=len(router.always_active),
        RENORMALIZE=router.renormalize,
        BLOCK_E=max(32, triton.next_power_of_2(router.num_experts)),
        BLOCK_K=triton.next_power_of_2(router.top_k),
        num_warps=1,
        enable_fp_fusion=True,
    )
    return Routed(weights_TK, slots_TK)


def _check(logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router) -> None:
    if router.num_experts > _MAX_EXPERTS:
        raise ValueError(f"the layer has {router.num_experts} experts; at most {_MAX_EXPERTS}")
    tokens, experts, rows = logits_TE.shape[0], router.num_experts, tables.members_PE.shape[0]
    floats = (torch.bfloat16, torch.float16, torch.float32)
    wanted = [
        ("logits_TE", logits_TE, (tokens, experts), floats),
        ("pool_rows_T", pool_rows_T, (tokens,), (torch.int32, torch.int64)),
        ("members_PE", tables.members_PE, (rows, experts), (torch.bool,)),
        ("temperatures_P", tables.temperatures_P, (rows,), (torch.float32,)),
        ("slot_of_expert_E", tables.slot_of_expert_E, (experts,), (torch.int32,)),
    ]
    if rows == 0:
        raise ValueError("members_PE has no row; a table holds one pool or more")
    for name, tensor, shape, dtypes in wanted:
        fits = tuple(tensor.shape) == shape and tensor.dtype in dtypes
        if not fits or tensor.device != logits_TE.device:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device};"
                f" wanted {' or '.join(map(str, dtypes))} of shape {shape} on {logits_TE.device}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the last must be 1")
