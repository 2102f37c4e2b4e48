"""Which way to choose a pool for a prompt is used: the router, a classifier, or one then the other.

Both follow pools that come and go, take none that the slab cannot hold, and fall back to the base
pool where it is resident and no other is good enough (`by_router`, `by_classifier`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from emo_serve.config import ServeSettings
from emo_serve.emo.config import EmoConfig
from emo_serve.errors import ConfigError
from emo_serve.pools.calibration.examples import Example, read_examples
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_classifier import TfidfChooser
from emo_serve.server.auto.by_router import RouterChooser
from emo_serve.server.auto.candidates import Candidates
from emo_serve.server.auto.classifier import is_installed
from emo_serve.server.auto.prompt_prefix import PromptPrefix
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.pool_admin.temporary import TemporaryPools
from emo_serve.server.tokenizer import ServedTokenizer

if TYPE_CHECKING:
    from emo_serve.server.router_probe import RouterProbe

__all__ = ["FallbackChooser", "PoolChooser", "make_chooser", "read_auto_examples", "text_of"]

logger = logging.getLogger(__name__)

_EXAMPLE_SUFFIXES = (".jsonl", ".ndjson", ".txt")


class PoolChooser(Protocol):
    """Choose a pool for a prompt; learn from examples of a pool's domain, if it can."""

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError, and what a lease raises."""

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Take these texts for the domain of the pool of that name, in place of any before."""


class FallbackChooser:
    """Ask the classifier while it knows two pools and every one there is, else the router."""

    def __init__(self, classifier: TfidfChooser, router: RouterChooser) -> None:
        self._classifier, self._router = classifier, router
        self._reported: list[str] = []

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises as the one that is asked does."""
        unknown = self._classifier.pools_without_examples()
        if self._classifier.is_able() and not unknown:
            return await self._classifier.choose(prompt)
        if self._classifier.is_able() and unknown != self._reported:
            self._reported = unknown
            logger.warning("auto uses the router: no examples of pool %s", ", ".join(unknown))
        return await self._router.choose(prompt)

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Give the classifier more to learn from."""
        self._classifier.add_examples(name, texts)


# -- at start --


def read_auto_examples(settings: ServeSettings) -> dict[str, list[str]]:
    """Read --auto-examples, by pool: NAME.jsonl or NAME.txt; nothing where nobody learns from it.

    Raises ConfigError for what cannot be read, and for --auto-method tfidf with nothing to learn
    from or without scikit-learn.
    """
    must = settings.auto_method == "tfidf"
    if must and settings.auto_examples is None:
        raise ConfigError("--auto-method tfidf learns from examples; give --auto-examples DIR")
    if settings.auto_method == "router" or settings.auto_examples is None:
        return {}
    if not is_installed():
        text = "scikit-learn is not installed: pip install 'emo-serve[auto]'"
        if must:
            raise ConfigError(f"--auto-method tfidf: {text}")
        logger.warning("auto uses the router: %s", text)
        return {}
    found: dict[str, list[str]] = {}
    for file in sorted(settings.auto_examples.iterdir()):
        if file.suffix in _EXAMPLE_SUFFIXES and not file.name.startswith("."):
            found.setdefault(file.stem, []).extend(map(text_of, read_examples([file])))
    if must and len(found) < 2:
        raise ConfigError(
            f"--auto-examples {settings.auto_examples} has examples for {len(found)} pools; two are"
            " needed, NAME.jsonl or NAME.txt each"
        )
    return found


def text_of(example: Example) -> str:
    """Return what a classifier reads of an example; of a chat, what was said."""
    if example.text is not None:
        return example.text
    return "\n".join(message["content"] for message in example.messages)


async def make_chooser(
    settings: ServeSettings,
    candidates: Candidates,
    temporary: TemporaryPools,
    probe: RouterProbe,
    tokenizer: ServedTokenizer,
    config: EmoConfig,
    examples: Mapping[str, Sequence[str]],
) -> PoolChooser:
    """Return who chooses, with the examples of `read_auto_examples` learned; raises ConfigError."""
    prefix = PromptPrefix(tokenizer, settings.auto_tokens, config.vocab_size)
    router = RouterChooser(
        probe, candidates, prefix, config.moe_layers, settings.auto_min_coverage, temporary
    )
    if settings.auto_method == "router" or not is_installed():
        return router
    classifier = TfidfChooser(candidates, prefix)
    for name, texts in examples.items():
        classifier.add_examples(name, texts)
    await classifier.fitted()
    return classifier if settings.auto_method == "tfidf" else FallbackChooser(classifier, router)
