"""Which chooser picks a prompt's pool: the router, a classifier, or both by vote.

All see pools as they are added and removed, skip those that the slab cannot hold, and fall back to
the base pool if it is resident and no other is good enough (`by_router`, `by_classifier`,
`by_vote`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from emo_serve.config import ServeSettings
from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts
from emo_serve.pools.calibration.examples import read_examples
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_classifier import TfidfChooser
from emo_serve.server.auto.by_router import RouterChooser
from emo_serve.server.auto.by_vote import VotingChooser
from emo_serve.server.auto.candidates import Candidates
from emo_serve.server.auto.classifier import Counts, is_installed
from emo_serve.server.auto.example_text import text_of
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.pool_admin.temporary import TemporaryPools
from emo_serve.server.tokenizer import ServedTokenizer

if TYPE_CHECKING:
    from emo_serve.server.router_probe import RouterProbe

__all__ = ["PoolChooser", "make_chooser", "read_auto_examples"]

logger = logging.getLogger(__name__)

_EXAMPLE_SUFFIXES = (".jsonl", ".ndjson", ".txt")


class PoolChooser(Protocol):
    """Choose a pool for a prompt; some choosers also learn from examples of a pool's domain."""

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError, and what a lease raises."""

    def add_examples(self, name: str, examples: Sequence[str] | Counts) -> None:
        """Use these texts, or their counts, as a pool's examples, replacing earlier ones."""


# -- at start --


def read_auto_examples(settings: ServeSettings) -> dict[str, list[str]]:
    """Return the texts of --auto-examples by pool; empty if the classifier is not used.

    The files are NAME.jsonl or NAME.txt. Raises ConfigError for files that cannot be read, and for
    --auto-method tfidf without scikit-learn or with examples of fewer than two pools.
    """
    needs_examples = settings.auto_method == "tfidf"
    if needs_examples and settings.auto_examples is None:
        raise ConfigError("--auto-method tfidf learns from examples; give --auto-examples DIR")
    if settings.auto_method == "router" or settings.auto_examples is None:
        return {}
    if not is_installed():
        text = "scikit-learn is not installed: pip install 'emo-serve[auto]'"
        if needs_examples:
            raise ConfigError(f"--auto-method tfidf: {text}")
        logger.warning("auto uses the router: %s", text)
        return {}
    found: dict[str, list[str]] = {}
    for file in sorted(settings.auto_examples.iterdir()):
        if file.suffix in _EXAMPLE_SUFFIXES and not file.name.startswith("."):
            found.setdefault(file.stem, []).extend(map(text_of, read_examples([file])))
    if needs_examples and len(found) < 2:
        raise ConfigError(
            f"--auto-examples {settings.auto_examples} has examples for {len(found)} pools,"
            " expected at least two; add NAME.jsonl or NAME.txt for each pool"
        )
    return found


async def make_chooser(
    settings: ServeSettings,
    candidates: Candidates,
    temporary: TemporaryPools,
    probe: RouterProbe,
    tokenizer: ServedTokenizer,
    facts: ModelFacts,
    examples: Mapping[str, Sequence[str]],
    learned: Callable[[], Mapping[str, Sequence[str] | Counts]] = dict,
) -> PoolChooser:
    """Return the chooser for --auto-method, with the examples of `read_auto_examples` learned.

    `learned` reads what is known of pools that were built here; it gives way to examples.
    """
    prefix = PromptPrefix(tokenizer, settings.auto_tokens, facts.vocab_size)
    router = RouterChooser(
        probe, candidates, prefix, facts.moe_layers, settings.auto_min_coverage, temporary
    )
    if settings.auto_method == "router" or not is_installed():
        return router
    classifier = TfidfChooser(candidates, prefix)
    for name, known in {**await asyncio.to_thread(learned), **examples}.items():
        classifier.add_examples(name, known)
    await classifier.fitted()
    return (
        classifier
        if settings.auto_method == "tfidf"
        else VotingChooser(candidates, classifier, router)
    )
