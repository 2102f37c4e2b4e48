"""What a pool's answers must be: transformers, with all other experts sliced out of the weights.

An independent check: nothing of emo-serve routes here. A pool's model has the gate's rows and the
experts that the pool keeps, and no others.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.families.models import (
    DENSE,
    DENSE_NAMES,
    LAYERS,
    MODELS,
    VOCABULARY,
    TinyModel,
    build,
)

__all__ = ["Pool", "expected_logprobs", "load", "others_of", "pools_of", "prompts"]

Pool = list[list[int]]
"""The experts kept per layer, none of a dense layer."""

_ROUTERS = ("gate.weight", "router.weight")


def pools_of(family: str) -> dict[str, Pool]:
    """Return pools a, b and c, of which a and b share experts.

    Together they fill the family's slots. The dense model has the base pool alone.
    """
    model = MODELS[family]
    if not model.pool_sizes:
        return {"base": [[] for _ in range(LAYERS)]}
    first, second, third = model.pool_sizes
    places = {
        "a": slice(first),
        "b": slice(min(first - 1, model.slots - second), None),
        "c": slice(model.slots - third, None),
    }
    sizes = dict(zip(places, model.pool_sizes, strict=True))
    return {
        name: [sorted(layer[place][: sizes[name]]) for layer in _in_slots(model)]
        for name, place in places.items()
    }


def others_of(family: str) -> Pool:
    """Return the experts that no pool has."""
    model = MODELS[family]
    return [
        sorted(set(range(model.num_experts)) - set(layer)) if layer else []
        for layer in _in_slots(model)
    ]


def _in_slots(model: TinyModel) -> Pool:
    """Return as many experts per layer as there are slots, in an order drawn at random."""
    rng = random.Random(1)
    return [
        [] if index in model.dense_layers else rng.sample(range(model.num_experts), model.slots)
        for index in range(LAYERS)
    ]


def prompts(count: int = 3, longest: int = 48) -> list[list[int]]:
    """Return prompts of random tokens, of different lengths."""
    rng = random.Random(7)
    lengths = [rng.randint(longest // 2, longest) for _ in range(count)]
    return [[rng.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]


def load(directory: Path) -> nn.Module:
    """Read a whole checkpoint into transformers' model; the dense one is unknown to it."""
    return transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def expected_logprobs(
    family: str, directory: Path, pools: Mapping[str, Pool], texts: Sequence[Sequence[int]]
) -> dict[str, list[list[float]]]:
    """Return for each pool, of each prompt, the log-probability of every token after the first."""
    model = MODELS[family]
    whole = _llama(directory) if model.experts is None else load(directory)
    return {
        name: [_logprobs(_kept(model, whole, pool), ids) for ids in texts]
        for name, pool in pools.items()
    }


@torch.no_grad()
def _logprobs(made: nn.Module, ids: Sequence[int]) -> list[float]:
    ids_1T = torch.tensor([list(ids)])
    scores_TV = made(ids_1T).logits[0, :-1].log_softmax(-1)
    return scores_TV.gather(-1, ids_1T[0, 1:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def _kept(model: TinyModel, whole: nn.Module, pool: Pool) -> nn.Module:
    """Return the smaller model that a pool's experts make, the same number in each layer."""
    counts = {len(layer) for layer in pool if layer}
    if not counts or counts == {model.num_experts}:
        return whole
    (count,) = counts
    smaller = build(model, count)
    state: dict[str, Tensor] = {}
    for name, tensor in whole.state_dict().items():
        is_router = name.endswith(_ROUTERS) and tensor.shape[0] == model.num_experts
        if ".experts." in name or is_router:
            tensor = tensor[pool[int(name.split(".layers.")[1].split(".")[0])]]
        state[name] = tensor
    smaller.load_state_dict(state)
    return smaller


def _llama(directory: Path) -> nn.Module:
    """Read the dense baseline as the Llama that it is."""
    made = build(MODELS[DENSE])
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for theirs, ours in DENSE_NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    made.load_state_dict(state)
    return made
