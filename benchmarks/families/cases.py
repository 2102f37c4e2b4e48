"""What a server of each family is asked, and what it must answer: one case per family.

Most cases are tiny models made by transformers, compared with transformers. EMO, and EMO under its
older name, are the golden checkpoint, compared with what the released code answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.families.models import DENSE, MODELS, write_checkpoint
from benchmarks.families.oracle import Pool, expected_logprobs, others_of, pools_of, prompts
from tests.support.golden import checkpoints as golden_checkpoints

__all__ = ["FAMILIES", "Case", "Logprobs", "case_of", "largest_difference", "write_pools"]

Logprobs = dict[str, list[list[float]]]
"""For each pool, of each prompt, the log-probability of every token after the first."""

_GOLDEN: dict[str, dict[str, object]] = {"emo": {}, "emo-renamed": golden_checkpoints.RENAMED}
_GOLDEN_SLOTS = 27  # as many as the golden pools have in a layer, of 32 experts

FAMILIES = (*_GOLDEN, *MODELS)
"""Names of all cases."""


@dataclass(frozen=True)
class Case:
    """A checkpoint with pools that fit its slots at once; `slots` is 0 for a dense model.

    `others` are the experts that no pool has. `expected` says what a pool of any experts, the same
    number in each layer, must answer; None where only the answers of `pools` are known.
    """

    family: str
    directory: Path
    num_experts: int
    slots: int
    pools: dict[str, Pool]
    texts: list[list[int]]
    answers: Logprobs
    others: Pool
    expected: Callable[[Mapping[str, Pool], Sequence[Sequence[int]]], Logprobs] | None = None


def case_of(family: str, root: Path) -> Case:
    """Write a family's checkpoint below `root`, and work out what its pools must answer."""
    directory = root / family
    if family in _GOLDEN:
        golden_checkpoints.write_checkpoint("shared1", directory, **_GOLDEN[family])
        golden = golden_checkpoints.golden()
        every = set(range(golden_checkpoints.config_of("shared1")["num_experts"]))
        others = [
            sorted(every.difference(*layer)) for layer in zip(*golden.pools.values(), strict=True)
        ]
        return Case(
            family,
            directory,
            len(every),
            _GOLDEN_SLOTS,
            golden.pools,
            golden.prompts,
            golden.prompt_logprobs,
            others,
        )
    write_checkpoint(family, directory)

    def expected(pools: Mapping[str, Pool], texts: Sequence[Sequence[int]]) -> Logprobs:
        return expected_logprobs(family, directory, pools, texts)

    model, pools, texts = MODELS[family], pools_of(family), prompts()
    return Case(
        family,
        directory,
        model.num_experts,
        model.slots,
        pools,
        texts,
        expected(pools, texts),
        others_of(family),
        None if family == DENSE else expected,
    )


def write_pools(pools: Mapping[str, Pool], directory: Path) -> Path:
    """Write a file per pool that is not the base pool; a layer of no experts is dense."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, layers in pools.items():
        if name != "base":
            entries = [{"experts": ids} if ids else None for ids in layers]
            document = {"format": "emo-pool/1", "name": name, "layers": entries}
            (directory / f"{name}.json").write_text(json.dumps(document))
    return directory


def largest_difference(
    got: Mapping[str, Sequence[Sequence[float]]],
    expected: Mapping[str, Sequence[Sequence[float]]],
) -> float:
    """Return the largest distance between two log-probabilities of the same token."""
    return max(
        abs(mine - theirs)
        for pool, answers in got.items()
        for ours, wanted in zip(answers, expected[pool], strict=True)
        for mine, theirs in zip(ours, wanted, strict=True)
    )
