"""Find a domain's pool: score every expert on the domain's documents, keep the best.

One method so far, `router`: one pass of the full model, and an expert's score is the router's
softmax averaged over all tokens, layer by layer. Every expert keeps its score in the pool, so the
same calibration can be served at any size (`ExpertPool.cut`).

Shared experts are scored apart, by the softmax among themselves; always-active layers have one
softmax over all experts. Either kind is in the pool whatever it scores.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.errors import ConfigError
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration, PoolModel

__all__ = ["pool_from_scores", "router_pool", "router_scores"]


@torch.no_grad()
def router_scores(
    model: EmoForCausalLM, documents: Iterable[Tensor]
) -> tuple[tuple[float, ...] | None, ...]:
    """Return each layer's mean router probability an expert, None for a dense layer.

    `documents` are int64 ids [T], without padding; every token counts the same. Raises ConfigError
    when there is no token at all.
    """
    sums: dict[int, Tensor] = {}
    tokens = 0
    for ids_T in documents:
        record: list[RouterRecord] = []
        model(ids_T[None], record=record)
        for router in record:
            mass_E = _mass(model, router)
            sums[router.layer] = sums.get(router.layer, torch.zeros_like(mass_E)) + mass_E
        tokens += len(ids_T)
    if not tokens:
        raise ConfigError("calibration needs at least one token of the domain's text")
    layers = model.config.moe_layers
    return tuple(
        None if moe is None else tuple((sums[index] / tokens).tolist())
        for index, moe in enumerate(layers)
    )


def _mass(model: EmoForCausalLM, router: RouterRecord) -> Tensor:
    """Return the probability each expert of the layer gets, summed over the tokens, fp64 [E]."""
    standard_TS = router.probabilities_BTS.flatten(0, 1)
    logits_TE = router.logits_BTE.flatten(0, 1)
    apart_TN = logits_TE[:, standard_TS.shape[-1] :].softmax(-1)  # the shared experts, if any
    return torch.cat([standard_TS, apart_TN], -1).double().sum(0)


def pool_from_scores(
    name: str,
    scores: Iterable[tuple[float, ...] | None],
    k: int,
    model: EmoForCausalLM,
    description: str = "",
    made_for: PoolModel | None = None,
    calibration: PoolCalibration | None = None,
) -> ExpertPool:
    """Keep the `k` best-scored experts of each layer, shared and always-active ones included."""
    layers = tuple(
        None if layer is None else LayerExperts(tuple(range(len(layer))), layer) for layer in scores
    )
    every = ExpertPool(
        name, layers, description=description, model=made_for, calibration=calibration
    )
    return every.cut(k, model.config.moe_layers)


def router_pool(
    name: str,
    model: EmoForCausalLM,
    documents: Iterable[Tensor],
    k: int,
    description: str = "",
    made_for: PoolModel | None = None,
) -> ExpertPool:
    """Calibrate a pool of `k` experts a layer by the `router` method."""
    documents = list(documents)
    calibration = PoolCalibration("router", len(documents), sum(map(len, documents)))
    scores = router_scores(model, documents)
    return pool_from_scores(name, scores, k, model, description, made_for, calibration)
