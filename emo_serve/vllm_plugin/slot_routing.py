"""Routing inside a pool to slots in plain torch, for backends without a kernel for it.

Shapes: T tokens, E experts, K experts a token takes.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from emo_kernels import PoolTables, Router
from emo_serve.emo.routing import route
from emo_serve.facts import MoeLayer

__all__ = ["route_in_pools", "route_to_slots"]


def route_to_slots(
    logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router
) -> tuple[Tensor, Tensor]:
    """Return weights_TK fp32 and slots_TK int32.

    Each of the K places names a slot, as vLLM's kernel requires; a place that takes no expert has
    weight 0 and any slot, which must not be computed with: 0 times what it holds could be nan.
    """
    weights_TK, experts_TK = route_in_pools(logits_TE, pool_rows_T, tables, router)
    return weights_TK, tables.slot_of_expert_E[experts_TK]


def route_in_pools(
    logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router
) -> tuple[Tensor, Tensor]:
    """Return weights_TK fp32 and experts_TK int64; a place that takes no expert has weight 0.

    Uses emo.routing, since emo_kernels' torch twin sorts all experts of every token. Padding routes
    like the last pool's tokens: it comes only with CUDA graphs, which these backends never run in.
    """
    routing = route(
        logits_TE,
        _layer_of(router),
        tables.members_PE[pool_rows_T],
        tables.temperatures_P[pool_rows_T, None],
        router.renormalize,
    )
    return routing.weights_TK.contiguous(), routing.experts_TK


@cache
def _layer_of(router: Router) -> MoeLayer:
    return MoeLayer(router.num_experts, router.num_shared, router.always_active, router.top_k)
