"""Choose by classifier and router together: their errors differ, and a short prompt needs both.

The classifier is asked first. Where it leads clearly, as on most prompts of some length, it decides
alone and the engine is not asked. Otherwise each pool's vote is its margin and its share of the
router's mass, weighted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from emo_serve.errors import Unavailable
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_classifier import TfidfChooser
from emo_serve.server.auto.by_router import RouterChooser
from emo_serve.server.auto.candidates import Candidates, nothing_to_choose, ranked
from emo_serve.server.auto.classifier import Counts
from emo_serve.server.auto.prompt_text import Prompt

__all__ = ["LEAST_MARGIN", "ROUTER_WEIGHT", "SURE_LEAD", "UNSURE_LEAD", "VotingChooser"]

logger = logging.getLogger(__name__)

# benchmarks/accuracy/auto_margins.py chose these, by cross-validation on the demo's examples.
ROUTER_WEIGHT = 2.5
SURE_LEAD = 0.5
"""The classifier decides alone where its best pool leads by as much."""
UNSURE_LEAD = 0.2
"""A prompt goes to the base pool, if that is resident, where the vote's best leads by less."""
LEAST_MARGIN = -0.6
"""And so it does where the classifier's margin of the vote's best is below this."""


class VotingChooser:
    """Ask classifier and router; while a pool has no examples, or there is one pool, the router."""

    def __init__(
        self, candidates: Candidates, classifier: TfidfChooser, router: RouterChooser
    ) -> None:
        self._candidates, self._classifier, self._router = candidates, classifier, router
        self._reported: list[str] = []

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises what the chooser that is asked raises."""
        unknown = self._classifier.pools_without_examples()
        if self._classifier.is_able() and not unknown:
            return await self._choose(prompt)
        if self._classifier.is_able() and unknown != self._reported:
            self._reported = unknown
            logger.warning("auto uses the router: no examples of pool %s", ", ".join(unknown))
        return await self._router.choose(prompt)

    async def _choose(self, prompt: Prompt) -> ExpertPool:
        votes = margins = await self._classifier.margins(prompt)
        pools = ranked(self._candidates.pools(), votes)
        if _lead(pools, votes) < SURE_LEAD:
            votes = await self._with_router(prompt, votes)
            pools = ranked(self._candidates.pools(), votes)
        base = self._candidates.base()
        is_unsure = _lead(pools, votes) < UNSURE_LEAD or margins[pools[0].name] < LEAST_MARGIN
        if base is not None and is_unsure:
            return base
        if not pools:  # they went while they were asked about
            raise nothing_to_choose("the pools have changed")
        return pools[0]

    async def _with_router(self, prompt: Prompt, votes: Mapping[str, float]) -> Mapping[str, float]:
        """Add the router's votes; those of the classifier stand alone while it cannot be asked."""
        try:
            shares = await self._router.shares(prompt)
        except Unavailable as error:
            logger.info("auto does without the router: %s", error)
            return votes
        both = shares.keys() & votes
        return {name: votes[name] + ROUTER_WEIGHT * shares[name] for name in both}

    def add_examples(self, name: str, examples: Sequence[str] | Counts) -> None:
        """Pass the examples to the classifier."""
        self._classifier.add_examples(name, examples)


def _lead(pools: Sequence[ExpertPool], votes: Mapping[str, float]) -> float:
    """Return by how much the first is ahead of the second; 0 if there are not two."""
    if len(pools) < 2:
        return 0.0
    first, second, *_ = pools
    return votes[first.name] - votes[second.name]
