"""Choose by a linear classifier of character n-grams, fitted on examples of the pools' domains.

It costs no engine step, but can choose only pools that have examples. benchmarks/accuracy/auto.py
compares it with the router: where every pool has examples, the classifier is better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.candidates import Candidates, nothing_to_choose, pool_size
from emo_serve.server.auto.classifier import PoolClassifier
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt

__all__ = ["MIN_MARGIN", "TfidfChooser"]

logger = logging.getLogger(__name__)

MIN_MARGIN = -0.25
"""A prompt goes to the base pool if its margin is below this in every domain.

Measured on 241 held-out texts of the demo's 10 domains, each domain left out once (2026-11-23,
accuracy/auto.py --margins): at 16, 64 and 256 tokens, 89, 86 and 83 % of texts of an unknown domain
go to the base pool, and 30, 8 and 2 % of the others."""
_MAX_CHARACTERS = 500_000
"""How much of one pool's examples the classifier reads; fitting them takes about a second."""


class TfidfChooser:
    """Choose the pool whose half-space the prompt's first tokens lie farthest inside.

    If no margin reaches MIN_MARGIN and the base pool is resident, choose the base pool. Candidates
    are the pools that have examples. New examples are learned in a thread; until that is done, the
    old classifier answers.
    """

    def __init__(self, candidates: Candidates, prefix: PromptPrefix) -> None:
        self._candidates, self._prefix = candidates, prefix
        self._examples: Mapping[str, tuple[str, ...]] = {}
        self._fitted_examples: Mapping[str, tuple[str, ...]] = self._examples
        self._classifier: PoolClassifier | None = None
        self._fitting: asyncio.Task[None] | None = None

    def is_able(self) -> bool:
        """Tell whether at least two pools have been learned, so that there is a choice."""
        return len(self._candidates.pools()) - len(self.pools_without_examples()) > 1

    def pools_without_examples(self) -> list[str]:
        """Return the names of pools that cannot be chosen, for lack of learned examples."""
        names = () if self._classifier is None else self._classifier.names
        return [pool.name for pool in self._candidates.pools() if pool.name not in names]

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError if fewer than two pools have been learned."""
        margins: Mapping[str, float] = {}
        if self._classifier is not None and self.is_able():
            text = await self._prefix.text(prompt)
            margins = await asyncio.to_thread(self._classifier.margins, text)
        base = self._candidates.base()
        known = [pool for pool in self._candidates.pools() if pool.name in margins]
        best = min(
            known, key=lambda pool: (-margins[pool.name], pool_size(pool), pool.name), default=None
        )
        if base is not None and (best is None or margins[best.name] < MIN_MARGIN):
            return base
        if best is None:
            raise nothing_to_choose("fewer than two pools have examples (--auto-examples)")
        return best

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Replace the examples of one pool, and learn them soon.

        Blank texts and everything after the first 500000 characters are left out.
        """
        kept = tuple(_bounded(name, texts))
        if kept:
            self._change({**self._examples, name: kept})

    async def fitted(self) -> None:
        """Wait until all examples given so far are learned."""
        if self._fitting is not None:
            await asyncio.shield(self._fitting)

    def _change(self, examples: Mapping[str, tuple[str, ...]]) -> None:
        self._examples = examples
        if self._fitting is None or self._fitting.done():
            self._fitting = asyncio.ensure_future(self._fit())

    async def _fit(self) -> None:
        while self._fitted_examples is not self._examples:
            examples = self._examples
            is_enough = len(examples) > 1
            classifier = (
                await asyncio.to_thread(PoolClassifier.fit, examples) if is_enough else None
            )
            self._classifier, self._fitted_examples = classifier, examples


def _bounded(name: str, texts: Sequence[str]) -> list[str]:
    kept: list[str] = []
    left = _MAX_CHARACTERS
    for text in texts:
        if text.strip() and left > 0:
            kept.append(text[:left])
            left -= len(text)
    if left < 0:
        logger.warning(
            "pool %s: auto learns from only the first %d characters of its examples",
            name,
            _MAX_CHARACTERS,
        )
    return kept
