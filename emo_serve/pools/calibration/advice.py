"""What to think of a calibration: is the text enough, and is it of one domain?

Coverage alone does not tell: it falls with the size of the pool, and an honest domain may be broad.
So it is compared with what the same text would have if every passage of it, up to `PASSAGE_TOKENS`
long, had a pool of the same size to itself. Text of one domain comes close to that; text of several
does not, for its passages want different experts.

Both bounds were measured on the shipped models' held-out texts (benchmarks/accuracy/calibration.py,
the tables `mixture` and `amount`; its results file has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from emo_serve.pools.calibration.examples import Documents
from emo_serve.pools.calibration.findings import Calibration

if TYPE_CHECKING:  # emo.config imports transformers
    from emo_serve.emo.config import EmoConfig

__all__ = [
    "MIXED_BOUND",
    "PASSAGE_TOKENS",
    "SHORTEST_TOLD",
    "TOKENS_PER_EXPERT",
    "cut_notes",
    "notes",
    "passages",
]

PASSAGE_TOKENS = 256
MIXED_BOUND = 0.93
"""Coverage, as a share of the passages' own, below which the text is clearly of several domains.

Median and range for 10 documents of 256 tokens, emo-demo, pools of 4, 8 and 16 of 32 experts:

    one domain     0.99 (0.94-1.00)   0.99 (0.97-1.00)   0.99 (0.98-1.00)
    two            0.70 (0.66-0.87)   0.87 (0.80-0.96)   0.95 (0.93-0.99)
    three          0.65 (0.56-0.86)   0.77 (0.74-0.89)   0.93 (0.90-0.95)
    five           0.54 (0.48-0.66)   0.67 (0.61-0.70)   0.86 (0.83-0.90)

One domain is never blamed; two pass where a pool is large enough for both.
"""
SHORTEST_TOLD = 32
"""Tokens a document, on average, below which mixtures are not told: the best experts of a few
tokens are chance, and no common pool comes close to them."""
TOKENS_PER_EXPERT = 8
"""Tokens for each expert of the largest layer, below which there is too little text.

That is 256 for the shipped models, under a page. Found on 16, 32, 64 and 256 tokens, emo-demo's
pools of 4 experts were 0.15, 0.04, 0.02 and 0.00 nats a token worse than those found on 7,680;
pools of 8 were 0.05, 0.02, 0.01 and 0.01. That more experts need more text in proportion is an
assumption.
"""


def passages(spans: Sequence[slice]) -> Iterator[slice]:
    """Cut each document into as few passages of at most PASSAGE_TOKENS as there can be, alike."""
    for span in spans:
        length = span.stop - span.start
        count = -(-length // PASSAGE_TOKENS)
        ends = [span.start + length * part // count for part in range(count + 1)]
        yield from (slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False))


def notes(found: Calibration, config: EmoConfig) -> list[str]:
    """Return what a user should know before relying on the pool, a sentence each."""
    said: list[str] = []
    moes = [moe for moe in config.moe_layers if moe is not None]
    fewest = TOKENS_PER_EXPERT * max(moe.num_experts for moe in moes)
    if found.documents and found.tokens < fewest and found.method != "random":
        said.append(
            f"{found.tokens} tokens are little text: with fewer than {fewest} (8 for each expert of"
            " a layer) the choice rests on chance; add examples"
        )
    coverage, own = found.coverage, found.own_coverage
    is_told = found.tokens >= SHORTEST_TOLD * found.documents and found.method != "random"
    if is_told and coverage is not None and own is not None and coverage < MIXED_BOUND * own:
        said.append(
            f"the examples mix domains: this pool covers {coverage / own:.2f} of what passages'"
            f" own pools would ({own:.3f}), for one domain it is at least {MIXED_BOUND}; build a"
            " pool for each domain, or keep more experts"
        )
    top_k = max(moe.top_k for moe in moes)
    if found.k < top_k:
        said.append(f"the pool has fewer experts than a token takes, {found.k} of {top_k}")
    return said


def cut_notes(documents: Documents) -> list[str]:
    """Return what a user should know of documents that were too long, if any was."""
    if not documents.num_cut:
        return []
    return [
        f"{documents.num_cut} of {len(documents.ids)} documents are longer than the model's context"
        f" of {documents.limit} tokens: {documents.tokens_cut} tokens after it were left out; give"
        " them as documents of their own to use them"
    ]
