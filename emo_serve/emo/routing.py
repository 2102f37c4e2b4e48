"""EMO's routing inside a pool, in plain torch: the definition every kernel is compared with.

Shapes: T tokens, E experts of the layer, K experts a token takes.

Two rules exist in released checkpoints (https://github.com/allenai/EMO, modeling_emo.py):

- shared experts (the last ids) have a softmax of their own and are all taken; the other experts,
  inside the pool, share a second softmax whose K - num_shared largest values are taken;
- always-active experts, where a layer names any, replace that rule: ONE softmax over the pool's
  experts, the always-active ones taken with their own values, the rest by top-k among the others.

Weights are the softmax's values, not renormalised unless `norm_topk_prob`. The mask comes before
the softmax: that is what training did, and what slicing the gate's rows gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emo_serve.facts import MoeLayer

__all__ = [
    "Routing",
    "route",
    "router_probabilities",
    "standard_probabilities",
    "taken_experts",
]


@dataclass(frozen=True)
class Routing:
    """The experts each token takes, weights_TK (fp32) and experts_TK (int64 ids of the layer).

    A token whose pool holds fewer than K experts has weight 0 and id 0 in the places left over.
    """

    weights_TK: Tensor
    experts_TK: Tensor


def route(
    logits_TE: Tensor,
    layer: MoeLayer,
    pool_TE: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    norm_topk_prob: bool = False,
) -> Routing:
    """Choose each token's experts inside its pool.

    `pool_TE` is True where the token's pool holds the expert (broadcastable; None: the base pool);
    shared and always-active experts belong to every pool, whatever it says. `temperature`
    divides the logits, one value or one a token [T, 1]. All arithmetic is fp32.
    """
    scaled_TE = logits_TE.float() / temperature
    if layer.always_active:
        return _route_always_active(scaled_TE, layer, pool_TE)
    num_shared = layer.num_shared_experts
    probabilities_TS = standard_probabilities(scaled_TE, layer, pool_TE)
    weights_TK, experts_TK = _top_k(probabilities_TS, layer.top_k - num_shared)
    if norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
    if num_shared:
        shared_TN = scaled_TE[:, -num_shared:].softmax(-1)
        first = layer.num_experts - num_shared
        ids_N = torch.arange(first, layer.num_experts, device=logits_TE.device)
        weights_TK = torch.cat([weights_TK, shared_TN], -1)
        experts_TK = torch.cat([experts_TK, ids_N.expand_as(shared_TN)], -1)
    return Routing(weights_TK, experts_TK)


def taken_experts(logits_TE: Tensor, layer: MoeLayer, pool_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts that `route` gives each token, without their weights: at less cost.

    experts_TK, in no order, and bool is_taken_TK, False in the places that a small pool leaves
    over. Neither temperature nor renormalisation changes which, unless a weight underflows to 0.
    """
    num_standard, num_experts = layer.num_standard_experts, layer.num_experts
    outside_TS = ~pool_TE[:, :num_standard]
    if layer.always_active:
        fixed_N = torch.tensor(layer.always_active, device=logits_TE.device)
        outside_TS[:, num_experts - layer.num_shared_experts :] = False
        outside_TS.index_fill_(-1, fixed_N, True)
    else:
        fixed_N = torch.arange(num_standard, num_experts, device=logits_TE.device)
    ranked_TS = logits_TE[:, :num_standard].masked_fill(outside_TS, float("-inf"))
    best_TK, experts_TK = ranked_TS.topk(
        min(layer.top_k - len(fixed_N), num_standard), sorted=False
    )
    fixed_TN = fixed_N.expand(len(logits_TE), -1)
    is_taken_TK = best_TK > float("-inf")
    return (
        torch.cat([experts_TK, fixed_TN], -1),
        torch.cat([is_taken_TK, torch.ones_like(fixed_TN, dtype=torch.bool)], -1),
    )


def standard_probabilities(logits_TE: Tensor, layer: MoeLayer, pool_TE: Tensor | None) -> Tensor:
    """Return the softmax over the pool's experts that are not shared, fp32 [T, E - num_shared].

    A layer with always-active experts has one softmax over all: then the shape is [T, E]. Where a
    pool holds none of the experts, its rows are 0.
    """
    standard_TS = logits_TE[:, : layer.num_standard_experts]
    if pool_TE is None:
        return standard_TS.softmax(-1, dtype=torch.float32)
    outside_TS = ~pool_TE[:, : layer.num_standard_experts]
    masked_TS = standard_TS.masked_fill(outside_TS, float("-inf"))
    probabilities_TS = masked_TS.softmax(-1, dtype=torch.float32)
    return probabilities_TS.masked_fill(outside_TS, 0.0)  # an empty pool's softmax is nan


def router_probabilities(logits_TE: Tensor, layer: MoeLayer) -> Tensor:
    """Return the full router's probability of each expert, fp32 [T, E].

    Shared experts have a softmax of their own; with always-active experts there is one over all.
    """
    standard_TS = standard_probabilities(logits_TE, layer, None)
    shared_TN = logits_TE[:, standard_TS.shape[-1] :].float().softmax(-1)
    return torch.cat([standard_TS, shared_TN], -1)


def _top_k(probabilities_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights_TK, experts_TK = probabilities_TS.topk(min(k, probabilities_TS.shape[-1]), -1)
    return weights_TK, experts_TK.masked_fill(weights_TK == 0, 0)


def _route_always_active(scaled_TE: Tensor, layer: MoeLayer, pool_TE: Tensor | None) -> Routing:
    always_N = torch.tensor(layer.always_active, device=scaled_TE.device)
    if pool_TE is not None:
        pool_TE = pool_TE.index_fill(-1, always_N, True)
        if layer.num_shared_experts:
            pool_TE = pool_TE.clone()
            pool_TE[:, -layer.num_shared_experts :] = True
    probabilities_TE = standard_probabilities(scaled_TE, layer, pool_TE)
    others_TE = probabilities_TE.index_fill(-1, always_N, 0.0)
    k = layer.top_k - len(layer.always_active)
    weights_TK, experts_TK = _top_k(others_TE, min(k, layer.num_experts - len(always_N)))
    return Routing(
        torch.cat([probabilities_TE[:, always_N], weights_TK], -1),
        torch.cat([always_N.expand(len(scaled_TE), -1), experts_TK], -1),
    )
