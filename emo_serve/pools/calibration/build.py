"""Find a domain's pool: run its documents through a checkpoint, score every expert, keep the best.

Four methods share one walk over the layers (`layer_walk`), without padding. They differ in how an
expert is scored and in which experts compute the input of the next layer:

- `layerwise`: the router's softmax averaged over all tokens; layer l is scored with layers 0..l-1
  already restricted to the experts kept there, so only K experts per layer are ever read. The
  published default.
- `router`: the same score, on the path of the full model.
- `easy-ep` (arXiv 2504.06792): the sum over tokens of weight x norm x change, on the path of the
  full model. The weight is the router's, 0 for an expert the token does not take; the norm is the
  L2 norm of that expert's own output, unweighted; the change is 1 - cos(h, h + y), not below 0,
  where h is the residual stream that enters the MoE block, after attention and BEFORE the block's
  RMSNorm, and y what the block adds to it, shared experts included. This is how the paper's authors
  measure it (github.com/RUCAIBox/EASYEP, pruning/model_new.py), except that they leave the shared
  experts out of y; EMO's script (easy_ep_prune.py) takes the normed h.
- `random`: the control. Scores are drawn from a seed, and no documents are needed. With documents,
  the path is restricted as in `layerwise` and coverage is reported.

Shared experts are scored separately, by a softmax among themselves; always-active layers have one
softmax over all experts. Both kinds are in the pool whatever their score. Softmax in fp32, sums
over tokens in fp64. Every expert keeps its score, so the same run can be served at any size
(`ExpertPool.cut`).

Shapes: N tokens of all documents, P passages, E experts, K experts a token takes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.routing import Routing, route, router_probabilities
from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts, MoeLayer
from emo_serve.pools.calibration import DEFAULT_METHOD, METHODS
from emo_serve.pools.calibration.advice import passages
from emo_serve.pools.calibration.findings import Calibration, LayerFindings
from emo_serve.pools.calibration.layer_walk import LayerWalk, Mixture
from emo_serve.pools.limits import MOST_COUNT, storable
from emo_serve.pools.pool import PoolModel, keep_best

__all__ = [
    "calibrate",
    "check_request",
    "find_layer",
    "model_record",
    "num_steps",
    "random_scores",
]

_OF_THE_FULL_MODEL = ("router", "easy-ep")


def check_request(facts: ModelFacts, method: str, k: int, seed: int = 0) -> None:
    """Raise ConfigError for an unknown method, or a size or seed that this model cannot have."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; give one of {', '.join(METHODS)}")
    if not 0 <= seed <= MOST_COUNT:
        raise ConfigError(f"seed is {seed}; give 0 or more, below 2**63")
    sizes = [(moe.num_experts, index) for index, moe in enumerate(facts.moe_layers) if moe]
    if not sizes:
        raise ConfigError("the model has no MoE layer, so it has no pools")
    if k > max(sizes)[0]:
        raise ConfigError(
            f"a pool of {k} experts per layer is more than the model has: {max(sizes)[0]} at most"
            f" (layer {max(sizes)[1]}); give fewer"
        )
    for index, moe in enumerate(facts.moe_layers):
        if moe is not None and k < max(1, len(moe.implied)):
            raise ConfigError(
                f"a pool of {k} experts per layer is too small: layer {index} needs at least"
                f" {max(1, len(moe.implied))} (shared and always-active experts are never dropped)"
            )


def model_record(checkpoint: ModelCheckpoint) -> PoolModel:
    """Return what a pool file records about the model it was made for."""
    implied = (
        () if moe is None else tuple(sorted(moe.implied)) for moe in checkpoint.facts.moe_layers
    )
    name = storable(checkpoint.directory.resolve().name)
    return PoolModel(name, checkpoint.fingerprint(), tuple(implied))


def num_steps(facts: ModelFacts, method: str, k: int, num_documents: int) -> int:
    """Return the most steps `calibrate` reports: documents of each layer, and experts read."""
    last = _last_moe(facts)
    experts = list(facts.experts_per_layer[: last + 1])
    if method != "easy-ep":
        experts.pop()
    if method not in _OF_THE_FULL_MODEL:
        experts = [min(k, count) for count in experts]
    return (last + 1) * num_documents + sum(experts) if num_documents else 0


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    documents: Sequence[Tensor],
    k: int,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Calibration:
    """Score every expert on `documents`, int64 ids [T] each, and keep the `k` best per layer.

    The same arguments give the same result on the same machine; only `random` uses `seed`. Raises
    ConfigError for a request that `check_request` refuses, and if there is no token at all.
    """
    facts = checkpoint.facts
    check_request(facts, method, k, seed)
    documents = [ids_T for ids_T in documents if len(ids_T)]
    drawn = random_scores(facts, seed) if method == "random" else None
    if not documents and drawn is None:
        raise ConfigError("calibration needs at least one token of the domain's text")
    layers: list[LayerFindings | None] = [None] * len(facts.moe_layers)
    if not documents and drawn is not None:
        for index, moe in enumerate(facts.moe_layers):
            if moe is not None:
                layers[index] = _findings(drawn[index], moe, k)
        return Calibration(method, seed, k, 0, 0, tuple(layers), (0,) * len(layers), 0)
    walk = LayerWalk(checkpoint, documents, advance)
    last = _last_moe(facts)  # later layers change no score
    for index, moe in enumerate(facts.moe_layers[: last + 1]):
        walk.attend(index)
        if moe is None:
            walk.add_dense()
            continue
        logits_NE = walk.logits()
        mass_PE = _mass(logits_NE, moe, list(passages(walk.spans)))
        found = (
            find_layer(mass_PE, len(logits_NE), moe, k)
            if drawn is None
            else _findings(drawn[index], moe, k, mass_PE)
        )
        pool_1E = None
        if method not in _OF_THE_FULL_MODEL:
            pool_1E = torch.zeros(1, moe.num_experts, dtype=torch.bool)
            pool_1E[0, list(found.experts)] = True
        routing = route(logits_NE, moe, pool_1E, norm_topk_prob=facts.norm_topk_prob)
        if method == "easy-ep":
            scores_E = _easy_ep_scores(routing, walk.add_experts(index, routing), moe)
            found = _findings(scores_E, moe, k, mass_PE)
        elif index < last:
            walk.add_experts(index, routing)
        layers[index] = found
    return Calibration(
        method,
        seed,
        k,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        layers=tuple(layers),
        experts_read=tuple(walk.experts_read),
        bytes_read=walk.bytes_read,
    )


# -- scores --


def random_scores(facts: ModelFacts, seed: int) -> list[Tensor]:
    """Draw a score for every expert, [E] per layer; the same seed gives the same scores."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator) for count in facts.experts_per_layer]


def _mass(logits_NE: Tensor, moe: MoeLayer, spans: Sequence[slice]) -> Tensor:
    """Return the full router's probability of each expert, summed over a passage, fp64 [P, E]."""
    return torch.stack(
        [router_probabilities(logits_NE[span], moe).double().sum(0) for span in spans]
    )


def _easy_ep_scores(routing: Routing, mixture: Mixture, moe: MoeLayer) -> Tensor:
    change_N1 = (1 - mixture.cosines_N.double()).clamp(min=0)[:, None]
    parts_NK = routing.weights_TK.double() * mixture.norms_NK.double() * change_N1
    scores_E = torch.zeros(moe.num_experts, dtype=torch.float64)
    return scores_E.index_add(0, routing.experts_TK.flatten(), parts_NK.flatten())


# -- findings --


def find_layer(
    mass_PE: Tensor | Sequence[Sequence[float]], num_tokens: int, moe: MoeLayer, k: int
) -> LayerFindings:
    """Score a layer as `router` and `layerwise` do: the full router's mass, mean over tokens.

    `mass_PE` is that mass summed over the tokens of each passage; `num_tokens` counts all tokens.
    """
    mass_PE = torch.as_tensor(mass_PE, dtype=torch.float64)
    return _findings(mass_PE.sum(0) / num_tokens, moe, k, mass_PE)


def _findings(
    scores_E: Tensor, moe: MoeLayer, k: int, mass_PE: Tensor | None = None
) -> LayerFindings:
    scores = scores_E.tolist()
    experts = keep_best(scores, k, moe.implied)
    num_standard = moe.num_standard_experts
    if mass_PE is None or num_standard == 0:
        return LayerFindings(tuple(scores), experts, None, None)
    mass_PS = mass_PE[:, :num_standard]
    tokens = mass_PS.sum()  # each token's standard probabilities sum to 1
    inside = sum(mass_PS[:, [e for e in experts if e < num_standard]].sum(0).tolist())
    own = sum(
        sum(mass_S[e] for e in keep_best(mass_S, k, moe.implied) if e < num_standard)
        for mass_S in mass_PS.tolist()
    )
    return LayerFindings(tuple(scores), experts, inside / float(tokens), own / float(tokens))


def _last_moe(facts: ModelFacts) -> int:
    return max(index for index, moe in enumerate(facts.moe_layers) if moe is not None)
