"""Choose by a linear classifier of character n-grams, fitted on examples of the pools' domains.

It costs no engine step, but can choose only pools that have examples. benchmarks/accuracy/auto.py
compares it with the router, and with the vote of both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.candidates import Candidates, nothing_to_choose, ranked
from emo_serve.server.auto.classifier import (
    Counts,
    PoolClassifier,
    counts_of,
    counts_of_asking,
    merged,
)
from emo_serve.server.auto.example_text import bounded
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt

__all__ = ["MIN_MARGIN", "TfidfChooser"]

MIN_MARGIN = -0.25
"""A prompt goes to the base pool if its margin is below this in every domain.

Of the demo's examples, asked of a classifier that learned from others (accuracy/auto_margins.py,
2026-11-29), at 8, 16 and 64 tokens 62, 65 and 66 % of those of an unknown domain go to the base
pool, and 16, 9 and 3 % of the others."""
_Examples = tuple[str, ...] | Counts


class TfidfChooser:
    """Choose the pool whose half-space the prompt's first tokens lie farthest inside.

    If no margin reaches MIN_MARGIN and the base pool is resident, choose the base pool. Candidates
    are the pools that have examples. New examples are learned in a thread; until that is done, the
    old classifier answers.
    """

    def __init__(self, candidates: Candidates, prefix: PromptPrefix) -> None:
        self._candidates, self._prefix = candidates, prefix
        self._examples: Mapping[str, _Examples] = {}
        self._fitted_examples: Mapping[str, _Examples] = self._examples
        self._counted: dict[str, tuple[_Examples, Counts]] = {}  # with what was counted
        self._classifier: PoolClassifier | None = None
        self._fitting: asyncio.Task[None] | None = None

    def is_able(self) -> bool:
        """Tell whether at least two pools have been learned, so that there is a choice."""
        names = () if self._classifier is None else self._classifier.names
        return sum(pool.name in names for pool in self._candidates.pools()) > 1

    def pools_without_examples(self) -> list[str]:
        """Return the names of pools that cannot be chosen, for lack of learned examples."""
        names = () if self._classifier is None else self._classifier.names
        return [pool.name for pool in self._candidates.pools() if pool.name not in names]

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError if fewer than two pools have been learned."""
        margins = await self.margins(prompt)
        best = ranked(self._candidates.pools(), margins)[:1]
        base = self._candidates.base()
        if base is not None and not (best and margins[best[0].name] >= MIN_MARGIN):
            return base
        if not best:
            raise nothing_to_choose("fewer than two pools have examples (--auto-examples)")
        return best[0]

    async def margins(self, prompt: Prompt) -> Mapping[str, float]:
        """Return each learned pool's margin; none while fewer than two have been learned."""
        if self._classifier is None or not self.is_able():
            return {}
        text = await self._prefix.text(prompt)
        return await asyncio.to_thread(self._classifier.margins, text)

    def add_examples(self, name: str, examples: Sequence[str] | Counts) -> None:
        """Replace the examples of one pool, or their counts, and learn them soon.

        Blank texts and everything after the first 500000 characters are left out.
        """
        known = examples if isinstance(examples, Counts) else tuple(bounded(name, examples))
        if known:
            self._change({**self._examples, name: known})

    async def fitted(self) -> None:
        """Wait until all examples given so far are learned."""
        if self._fitting is not None:
            await asyncio.shield(self._fitting)

    def _change(self, examples: Mapping[str, _Examples]) -> None:
        self._examples = examples
        if self._fitting is None or self._fitting.done():
            self._fitting = asyncio.ensure_future(self._fit())

    async def _fit(self) -> None:
        while self._fitted_examples is not self._examples:
            examples = self._examples
            is_enough = len(examples) > 1
            classifier = await asyncio.to_thread(self._learned, examples) if is_enough else None
            self._classifier, self._fitted_examples = classifier, examples

    def _learned(self, examples: Mapping[str, _Examples]) -> PoolClassifier:
        """Fit a classifier, on a thread; what has been counted before is not counted again."""
        for name, known in examples.items():
            if name not in self._counted or self._counted[name][0] is not known:
                counts = known if isinstance(known, Counts) else counts_of(known)
                self._counted[name] = known, merged([counts, counts_of_asking(name)])
        return PoolClassifier.fit({name: self._counted[name][1] for name in examples})
