"""The four methods written plainly: the whole reference model in memory, one run per layer.

Nothing is shared with emo_serve.pools.calibration but the model itself and its routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emo_serve.emo.model import EmoForCausalLM, EmoMoe, RouterRecord
from emo_serve.emo.routing import route
from emo_serve.facts import MoeLayer

Scores = list[list[float] | None]


@torch.no_grad()
def records(
    model: EmoForCausalLM, documents: Sequence[Tensor], masks: list[Tensor | None] | None = None
) -> dict[int, list[RouterRecord]]:
    """Run every document by itself; return the records of each MoE layer."""
    found: dict[int, list[RouterRecord]] = {}
    for ids_T in documents:
        record: list[RouterRecord] = []
        model(ids_T[None], pool=masks, record=record)
        for router in record:
            found.setdefault(router.layer, []).append(router)
    return found


def mass(moe: MoeLayer, routers: list[RouterRecord]) -> list[float]:
    """Return the mean over tokens of softmaxes in fp64, the shared experts' apart."""
    shared = 0 if moe.always_active else moe.num_shared_experts
    sums, tokens = [0.0] * moe.num_experts, 0
    for router in routers:
        for logits_E in router.logits_BTE[0].double():
            standard = logits_E[: moe.num_experts - shared].softmax(-1).tolist()
            apart = logits_E[moe.num_experts - shared :].softmax(-1).tolist()
            sums = [a + b for a, b in zip(sums, [*standard, *apart], strict=True)]
            tokens += 1
    return [total / tokens for total in sums]


def router_scores(model: EmoForCausalLM, documents: Sequence[Tensor]) -> Scores:
    """Score all layers by one pass of the full model."""
    found = records(model, documents)
    layers = enumerate(model.config.moe_layers)
    return [None if moe is None else mass(moe, found[index]) for index, moe in layers]


def best(scores: Sequence[float], k: int, moe: MoeLayer) -> list[int]:
    """Keep the implied experts and the best of the others."""
    others = sorted(set(range(moe.num_experts)) - moe.implied, key=lambda e: (-scores[e], e))
    return sorted([*moe.implied, *others[: k - len(moe.implied)]])


def layerwise(
    model: EmoForCausalLM, documents: Sequence[Tensor], k: int
) -> tuple[Scores, list[list[int]]]:
    """Restrict layers 0..l-1, run EVERYTHING again, score layer l; return scores and kept ids."""
    masks: list[Tensor | None] = [None] * model.config.num_hidden_layers
    scores: Scores = []
    kept: list[list[int]] = []
    for index, moe in enumerate(model.config.moe_layers):
        if moe is None:
            scores.append(None)
            kept.append([])
            continue
        scores.append(mass(moe, records(model, documents, masks)[index]))
        kept.append(best(scores[-1] or [], k, moe))
        masks[index] = torch.zeros(moe.num_experts, dtype=torch.bool)
        masks[index][kept[-1]] = True  # type: ignore[index]
    return scores, kept


@torch.no_grad()
def easy_ep_scores(model: EmoForCausalLM, documents: Sequence[Tensor]) -> Scores:
    """Loop over tokens and their experts: weight x norm x (1 - cosine), summed."""
    scores: Scores = [
        None if moe is None else [0.0] * moe.num_experts for moe in model.config.moe_layers
    ]
    entering: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        norm = layer.pre_feedforward_layernorm

        def keep(module: object, args: tuple[Tensor, ...], index: int = index) -> None:
            entering[index] = args[0]

        hooks.append(norm.register_forward_pre_hook(keep))
    for ids_T in documents:
        model(ids_T[None])
        for index, layer in enumerate(model.model.layers):
            if isinstance(layer.mlp, EmoMoe):
                _add_tokens(layer, entering[index][0], model, scores[index] or [])
    for hook in hooks:
        hook.remove()
    return scores


def _add_tokens(
    layer: torch.nn.Module, h_TD: Tensor, model: EmoForCausalLM, scores: list[float]
) -> None:
    mlp = layer.mlp
    for h_D in h_TD:
        x_D = layer.pre_feedforward_layernorm(h_D)  # type: ignore[operator]
        routing = route(
            mlp.gate(x_D)[None],  # type: ignore[union-attr, operator]
            mlp.moe,  # type: ignore[union-attr, arg-type]
            norm_topk_prob=model.config.norm_topk_prob,
        )
        outputs, y_D = [], torch.zeros_like(h_D)
        for expert, weight in zip(
            routing.experts_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True
        ):
            gate_FD, up_FD = mlp.w13[expert].chunk(2)  # type: ignore[union-attr, index]
            inside = torch.nn.functional.silu(gate_FD @ x_D) * (up_FD @ x_D)
            out_D = mlp.w2[expert] @ inside  # type: ignore[union-attr, index]
            outputs.append((expert, weight * float(out_D.norm())))
            y_D = y_D + weight * out_D
        after_D = h_D + y_D
        cosine = float(h_D @ after_D) / float(h_D.norm() * after_D.norm())
        for expert, part in outputs:
            scores[expert] += part * max(0.0, 1 - cosine)
