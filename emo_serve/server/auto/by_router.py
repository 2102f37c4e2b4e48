"""Choose by EMO's own router: the pool that covers most of the full router's mass on a prompt.

The prompt's first tokens run through the engine as one request. They run in the base pool if that
is resident, otherwise in a pool of the implied experts alone, which any slab can hold beside other
pools. There, hidden states differ from the full model's, so the choice is slightly worse. The
router can choose every pool and needs no examples. Coverage grows with the size of a pool, so
larger pools are favoured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from emo_serve.facts import MoeLayer
from emo_serve.metrics import AUTO_PROBE_POOL
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.auto.candidates import Candidates, nothing_to_choose, ranked
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.pool_admin.temporary import TemporaryPools
from emo_serve.vllm_plugin.contract import RouterMass

if TYPE_CHECKING:
    from emo_serve.server.router_probe import RouterProbe

__all__ = ["RouterChooser", "coverages", "trunk_pool"]


def trunk_pool(moe_layers: Sequence[MoeLayer | None]) -> ExpertPool:
    """Return a pool of the implied experts alone, or expert 0 in layers without implied ones."""
    layers = (None if moe is None else LayerExperts(moe.smallest_pool) for moe in moe_layers)
    return ExpertPool(AUTO_PROBE_POOL, tuple(layers))


class RouterChooser:
    """Choose the pool that covers most of the full router's mass on the prompt's first tokens.

    If the best coverage is below `min_coverage` and the base pool is resident, choose the base
    pool. Among pools of equal coverage, choose the smallest, then the first by name.
    """

    def __init__(
        self,
        probe: RouterProbe,
        candidates: Candidates,
        prefix: PromptPrefix,
        moe_layers: Sequence[MoeLayer | None],
        min_coverage: float,
        temporary: TemporaryPools,
    ) -> None:
        self._probe, self._candidates, self._prefix = probe, candidates, prefix
        self._moe_layers = moe_layers
        self._min_coverage = min_coverage
        self._trunk = trunk_pool(moe_layers)
        self._temporary = temporary
        self._is_trunk_held = False

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError if there is none, and what a lease raises."""
        pools, base = self._candidates.pools(), self._candidates.base()
        if not pools and base is None:
            raise nothing_to_choose("the slab can hold none of the pools")
        if base is None and len(pools) == 1:
            return pools[0]
        if base is not None and not pools:
            return base
        shares = await self.shares(prompt)
        best = ranked(pools, shares)[0]
        return base if base is not None and shares[best.name] < self._min_coverage else best

    async def shares(self, prompt: Prompt) -> Mapping[str, float]:
        """Return each pool's share of the router's mass; raises what a lease raises."""
        pools, base = self._candidates.pools(), self._candidates.base()
        ids = await self._prefix.ids(prompt)
        if base is None and not self._is_trunk_held:
            # For good: the end of a build with an equal first pool must not retire it.
            self._temporary.hold(self._trunk)
            self._is_trunk_held = True
        # Under its own name, so that no probe is shown as a request for the base pool.
        asked = replace(base, name=AUTO_PROBE_POOL) if base else self._trunk
        mass = await self._probe.mass(asked, ids[: self._probe.max_tokens])
        found = coverages(mass, pools, self._moe_layers)
        return {pool.name: share for pool, share in zip(pools, found, strict=True)}

    def add_examples(self, name: str, examples: object) -> None:
        """Do nothing: the router needs no examples."""


def coverages(
    mass: RouterMass, pools: Sequence[ExpertPool], moe_layers: Sequence[MoeLayer | None]
) -> list[float]:
    """Return each pool's coverage: its share of the mass, from 0 to 1, mean over MoE layers.

    `mass` is summed over tokens. Shared experts do not count, as in calibration, and neither do
    layers that have only shared experts.
    """
    standard = [0 if moe is None else moe.num_standard_experts for moe in moe_layers]
    parts = [np.asarray(layer)[:count] for layer, count in zip(mass.layers, standard, strict=True)]
    mass_E = np.concatenate(parts) / (mass.tokens * max(1, sum(map(bool, standard))))
    starts = np.cumsum([0, *standard])
    inside_PE = np.zeros((len(pools), len(mass_E)))
    for row, pool in zip(inside_PE, pools, strict=True):
        for start, count, ids in zip(starts, standard, pool.expert_ids, strict=False):
            row[[start + expert for expert in ids if expert < count]] = 1.0
    return [float(share) for share in inside_PE @ mass_E]
