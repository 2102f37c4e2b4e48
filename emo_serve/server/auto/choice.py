"""Which pool a prompt belongs in: two ways to tell from its first tokens, and which is asked.

- `RouterChooser` asks EMO's own router. The tokens run through the engine as one request; the pool
  that covers most of the full router's mass wins. They run in the base pool where that is resident,
  else in a pool of no experts but the implied ones, which any slab can hold beside others: its path
  is not the model's, and the choice a little worse. Knows every pool, and needs nothing but them.
- `TfidfChooser` asks a linear classifier of character n-grams, fitted on examples of the pools'
  domains (`pool_classifier`). Costs no engine step; knows only pools that have examples.

Both follow pools that come and go, take none that the slab cannot hold, and fall back on the base
pool where it is resident and no other is good enough. Coverage grows with a pool's size: among
pools of different sizes the router favours the large ones.

benchmarks/accuracy/auto.py compares the two. The classifier is the better and takes no engine step,
but a pool without examples is never its choice: `BetterChooser` asks it while it knows every pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emo_serve.config import AUTO_POOL, ServeSettings
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.config import MoeLayer
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.errors import ConfigError, PoolBlocked, PoolTooLarge, RequestError, Unavailable
from emo_serve.metrics import AUTO_PROBE_POOL
from emo_serve.pools.calibration.examples import Example, read_examples
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.auto.classifier import PoolClassifier, is_installed
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.vllm_adapter.worker_calls import RouterMass

if TYPE_CHECKING:
    from emo_serve.server.vllm_adapter.probe import RouterProbe

__all__ = [
    "MIN_MARGIN",
    "Beginning",
    "BetterChooser",
    "Candidates",
    "PoolChooser",
    "RouterChooser",
    "TfidfChooser",
    "coverages",
    "make_chooser",
    "read_auto_examples",
    "text_of",
    "trunk_pool",
]

logger = logging.getLogger(__name__)

MIN_MARGIN = -0.25
"""How far outside every domain's half-space a prompt may lie and still be given a domain's pool.

241 held-out texts of the demo's 10 domains, each domain left out once (2026-11-23, accuracy/auto.py
--margins): of 16, 64 and 256 tokens it sends 89, 86 and 83 % of texts of an unknown domain to the
base pool, and 30, 8 and 2 % of the others."""
_CHARS_PER_TOKEN = 16  # what is tokenized at most; more only for runs of one character
_EXAMPLE_SUFFIXES = (".jsonl", ".ndjson", ".txt")
_MOST_CHARACTERS = 500_000
"""Of one pool's examples, what the classifier reads: it takes a second or so of fitting."""


class PoolChooser(Protocol):
    """Choose a pool for a prompt; learn from examples of a pool's domain, if it can."""

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError, and what a lease raises."""

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Take these texts for the domain of the pool of that name, in place of any before."""


# -- what both need --


class Candidates:
    """The pools a choice may fall on, asked of the service anew each time."""

    def __init__(self, service: PoolService) -> None:
        self._service = service

    def pools(self) -> list[ExpertPool]:
        """Return the catalog's pools that the slab can hold beside what is pinned."""
        return [pool for pool in self._service.catalog.pools.values() if self._may_serve(pool)]

    def base(self) -> ExpertPool | None:
        """Return the base pool where it is resident."""
        base = self._service.pools[0]
        return base if self._service.manager.is_resident(base) else None

    def keep(self, pool: ExpertPool) -> None:
        """Have a pool that no name leads to stay when a build ends whose first pool is the same."""
        self._service.keep(pool)

    def _may_serve(self, pool: ExpertPool) -> bool:
        try:
            self._service.manager.check_admissible(pool)
        except (PoolBlocked, PoolTooLarge):
            return False
        except Unavailable:  # that passes, or refuses the request whatever pool it gets
            return True
        return True


class Beginning:
    """Cut prompts to their first tokens, for those who need ids and those who need text.

    The tokenizer is opened when it is first needed: a server may be without one.
    """

    def __init__(self, directory: Path, num_tokens: int, vocab_size: int) -> None:
        self._directory = directory
        self._num_tokens = num_tokens
        self._vocab_size = vocab_size

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the first ids; RequestError for ids the model does not have, and for none."""
        ids = self._ids(prompt)
        if not ids:
            raise RequestError(f"model {AUTO_POOL!r} needs a prompt; this one has no token")
        return ids

    def text(self, prompt: Prompt) -> str:
        """Return the text of the first ids; raises as `ids` does."""
        return self._tokenizer.decode(self.ids(prompt))

    def _ids(self, prompt: Prompt) -> list[int]:
        if prompt.ids:
            ids = prompt.ids[: self._num_tokens]
            wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"the prompt has token id {wrong}; the model's are 0 to {self._vocab_size - 1}"
                )
            return list(ids)
        text = prompt.text[: self._num_tokens * _CHARS_PER_TOKEN]
        valid = text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
        return self._tokenizer.encode(valid)[: self._num_tokens]

    @cached_property
    def _tokenizer(self) -> ModelTokenizer:
        try:
            return ModelTokenizer(self._directory)
        except ConfigError as error:
            raise RequestError(f"model {AUTO_POOL!r} cannot read prompts here: {error}") from error


def _nothing_to_choose(reason: str) -> RequestError:
    return RequestError(
        f"model {AUTO_POOL!r} has no pool to choose: {reason}; name one, or see GET /v1/pools"
    )


def _size(pool: ExpertPool) -> int:
    return sum(map(len, pool.expert_ids))


# -- router --


def trunk_pool(moe_layers: Sequence[MoeLayer | None]) -> ExpertPool:
    """Return a pool of the implied experts alone; expert 0 in a layer that implies none."""
    layers = (None if moe is None else LayerExperts(moe.smallest_pool) for moe in moe_layers)
    return ExpertPool(AUTO_PROBE_POOL, tuple(layers))


class RouterChooser:
    """Choose the pool that covers most of the full router's mass on the prompt's first tokens.

    With less than `min_coverage` in the best, it is the base pool, where that is resident. Equal
    coverage goes to the smaller pool, then by name.
    """

    def __init__(
        self,
        probe: RouterProbe,
        candidates: Candidates,
        beginning: Beginning,
        moe_layers: Sequence[MoeLayer | None],
        min_coverage: float,
    ) -> None:
        self._probe, self._candidates, self._beginning = probe, candidates, beginning
        self._moe_layers = moe_layers
        self._min_coverage = min_coverage
        self._trunk = trunk_pool(moe_layers)
        self._is_trunk_kept = False

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError without any, and what a lease raises."""
        pools, base = self._candidates.pools(), self._candidates.base()
        if not pools and base is None:
            raise _nothing_to_choose("none is known that the slab can hold")
        if base is None and len(pools) == 1:
            return pools[0]
        if base is not None and not pools:
            return base
        ids = await asyncio.to_thread(self._beginning.ids, prompt)
        if base is None and not self._is_trunk_kept:
            self._candidates.keep(self._trunk)
            self._is_trunk_kept = True
        mass = await self._probe.mass(base or self._trunk, ids[: self._probe.max_tokens])
        shares = coverages(mass, pools, self._moe_layers)
        share, best = min(
            zip(shares, pools, strict=True),
            key=lambda pair: (-round(pair[0], 9), _size(pair[1]), pair[1].name),
        )
        return base if base is not None and share < self._min_coverage else best

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Do nothing: the router needs no examples."""


def coverages(
    mass: RouterMass, pools: Sequence[ExpertPool], moe_layers: Sequence[MoeLayer | None]
) -> list[float]:
    """Return each pool's coverage: the share of mass inside, mean over tokens and MoE layers.

    Shared experts do not count, as in calibration; nor does a layer of nothing else.
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


# -- classifier --


class TfidfChooser:
    """Choose the pool in whose half-space the prompt's first tokens lie farthest.

    With no margin of at least MIN_MARGIN it is the base pool, where that is resident. Candidates
    are the pools that have examples; a change of these is learned in a thread, and until then the
    old classifier answers.
    """

    def __init__(self, candidates: Candidates, beginning: Beginning) -> None:
        self._candidates, self._beginning = candidates, beginning
        self._examples: Mapping[str, tuple[str, ...]] = {}
        self._fitted_to: Mapping[str, tuple[str, ...]] = self._examples
        self._classifier: PoolClassifier | None = None
        self._fitting: asyncio.Task[None] | None = None

    def is_able(self) -> bool:
        """Tell whether there are two pools to choose between."""
        return len(self._candidates.pools()) - len(self.strangers()) > 1

    def strangers(self) -> list[str]:
        """Return the pools it cannot choose, having learned from no example of them."""
        names = () if self._classifier is None else self._classifier.names
        return [pool.name for pool in self._candidates.pools() if pool.name not in names]

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises RequestError with too few to choose between."""
        margins: Mapping[str, float] = {}
        if self._classifier is not None and self.is_able():
            margins = await asyncio.to_thread(self._margins, self._classifier, prompt)
        base = self._candidates.base()
        known = [pool for pool in self._candidates.pools() if pool.name in margins]
        best = min(
            known, key=lambda pool: (-margins[pool.name], _size(pool), pool.name), default=None
        )
        if base is not None and (best is None or margins[best.name] < MIN_MARGIN):
            return base
        if best is None:
            raise _nothing_to_choose("fewer than two pools have examples (--auto-examples)")
        return best

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        """Take these texts for the pool of that name; blank ones, and very much text, left out."""
        kept = tuple(_bounded(name, texts))
        if kept:
            self._change({**self._examples, name: kept})

    async def fitted(self) -> None:
        """Wait until every change so far is learned."""
        if self._fitting is not None:
            await asyncio.shield(self._fitting)

    def _margins(self, classifier: PoolClassifier, prompt: Prompt) -> Mapping[str, float]:
        return classifier.margins(self._beginning.text(prompt))

    def _change(self, examples: Mapping[str, tuple[str, ...]]) -> None:
        self._examples = examples
        if self._fitting is None or self._fitting.done():
            self._fitting = asyncio.ensure_future(self._fit())

    async def _fit(self) -> None:
        while self._fitted_to is not self._examples:
            examples = self._examples
            is_enough = len(examples) > 1
            classifier = (
                await asyncio.to_thread(PoolClassifier.fit, examples) if is_enough else None
            )
            self._classifier, self._fitted_to = classifier, examples


def _bounded(name: str, texts: Sequence[str]) -> list[str]:
    kept: list[str] = []
    left = _MOST_CHARACTERS
    for text in texts:
        if text.strip() and left > 0:
            kept.append(text[:left])
            left -= len(text)
    if left < 0:
        logger.warning(
            "pool %s: auto learns from the first %d characters of its examples",
            name,
            _MOST_CHARACTERS,
        )
    return kept


class BetterChooser:
    """Ask the classifier while it knows two pools and every one there is, else the router."""

    def __init__(self, classifier: TfidfChooser, router: RouterChooser) -> None:
        self._classifier, self._router = classifier, router
        self._strangers: list[str] = []

    async def choose(self, prompt: Prompt) -> ExpertPool:
        """Return the pool; raises as the one that is asked does."""
        strangers = self._classifier.strangers()
        if self._classifier.is_able() and not strangers:
            return await self._classifier.choose(prompt)
        if self._classifier.is_able() and strangers != self._strangers:
            self._strangers = strangers
            logger.warning("auto asks the router: no examples of %s", ", ".join(strangers))
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
        logger.warning("auto asks the router, for %s", text)
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
    service: PoolService,
    probe: RouterProbe,
    checkpoint: Checkpoint,
    examples: Mapping[str, Sequence[str]],
) -> PoolChooser:
    """Return who chooses, with the examples of `read_auto_examples` learned; raises ConfigError."""
    config = checkpoint.config
    beginning = Beginning(checkpoint.directory, settings.auto_tokens, config.vocab_size)
    candidates = Candidates(service)
    router = RouterChooser(
        probe, candidates, beginning, config.moe_layers, settings.auto_min_coverage
    )
    if settings.auto_method == "router" or not is_installed():
        return router
    classifier = TfidfChooser(candidates, beginning)
    for name, texts in examples.items():
        classifier.add_examples(name, texts)
    await classifier.fitted()
    return classifier if settings.auto_method == "tfidf" else BetterChooser(classifier, router)
