"""Which pools of a domain are measured, and how each is found.

A case is a method, a number of examples, a seed, a size and a temperature. Seeds draw the examples,
or for `random` the experts. A draw of more than half of the available examples is made only once:
draws of 20 out of 24 would all be nearly the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.pool import ExpertPool, LayerExperts

__all__ = ["FULL", "TRUNK", "Case", "build_pools", "cases_of", "implied_experts", "largest_layer"]

FULL = "full"  # all experts
TRUNK = "trunk"  # no expert but shared and always-active ones
_RANDOM = "random"
_FOUND_AT_ITS_SIZE = "layerwise"  # the other methods' scores do not depend on the size


@dataclass(frozen=True)
class Case:
    """One pool of each domain; `examples` 0 stands for all examples."""

    method: str
    k: int
    examples: int = 0
    seed: int = 0
    temperature: float = 1.0

    def pool_name(self, domain: str) -> str:
        """Return the name its pool is served by."""
        parts = (domain, self.method, f"n{self.examples}", f"s{self.seed}", f"k{self.k}")
        return "-".join([*parts, f"t{self.temperature:g}"])


def cases_of(
    checkpoint: Checkpoint,
    keep: Sequence[int],
    methods: Sequence[str],
    examples: Sequence[int],
    seeds: Sequence[int],
    temperatures: Sequence[float],
    num_examples: int,
) -> list[Case]:
    """List every case, the full model first; `temperatures` go with the first method and count."""
    largest, implied = largest_layer(checkpoint), implied_experts(checkpoint)
    cases = [Case(FULL, largest)] + ([Case(TRUNK, implied)] if implied else [])
    sizes = [k for k in keep if k < largest]
    for k in sizes:
        for method in methods:
            if method == _RANDOM:
                cases += [Case(method, k, seed=seed) for seed in seeds]
                continue
            for count in examples:
                is_drawn = 0 < 2 * count <= num_examples
                cases += [
                    Case(method, k, count, seed) for seed in (seeds if is_drawn else seeds[:1])
                ]
    first = next((method for method in methods if method != _RANDOM), None)
    for temperature in temperatures:
        cases.append(Case(FULL, largest, temperature=temperature))
        if first is not None:
            cases += [Case(first, k, examples[0], seeds[0], temperature) for k in sizes]
    return list(dict.fromkeys(cases))


def build_pools(
    checkpoint: Checkpoint, domain: str, examples: Sequence[Sequence[int]], cases: Sequence[Case]
) -> dict[Case, ExpertPool]:
    """Find the pool of each case from the domain's examples, as ids."""
    moe_layers = checkpoint.config.moe_layers
    limit = checkpoint.config.max_position_embeddings
    found: dict[tuple[object, ...], ExpertPool] = {}
    pools: dict[Case, ExpertPool] = {}
    for case in cases:
        if case.method == FULL:
            pool = ExpertPool.base(moe_layers)
        elif case.method == TRUNK:
            pool = ExpertPool("", tuple(moe and LayerExperts(()) for moe in moe_layers))
            pool = pool.complete(moe_layers)
        else:
            at = case.k if case.method == _FOUND_AT_ITS_SIZE else largest_layer(checkpoint)
            key = (case.method, case.examples, case.seed, at)
            if key not in found:
                chosen = [] if case.method == _RANDOM else draw(examples, case.examples, case.seed)
                ids = [torch.tensor(document[:limit]) for document in chosen]
                found[key] = calibrate(checkpoint, ids, at, case.method, case.seed).pool("found")
            pool = found[key].cut(case.k, moe_layers)
        name = case.pool_name(domain)
        pools[case] = ExpertPool(name, pool.layers, router_temperature=case.temperature)
    return pools


def draw(examples: Sequence[Sequence[int]], count: int, seed: int) -> list[Sequence[int]]:
    """Return `count` examples drawn at random, in their order; all of them for 0 or too many."""
    if not 0 < count < len(examples):
        return list(examples)
    places = random.Random(seed).sample(range(len(examples)), count)
    return [examples[place] for place in sorted(places)]


def largest_layer(checkpoint: Checkpoint) -> int:
    """Return the experts of the largest layer."""
    return max(moe.num_experts for moe in checkpoint.config.moe_layers if moe)


def implied_experts(checkpoint: Checkpoint) -> int:
    """Return the most shared and always-active experts of a layer; 0 if a MoE layer has none."""
    counts = [len(moe.implied) for moe in checkpoint.config.moe_layers if moe]
    return max(counts) if all(counts) else 0
