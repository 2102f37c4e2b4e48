"""Advice about a calibration: is there enough text, and is it from one domain?

Coverage alone is not enough to tell: it falls with the size of the pool, and a single domain may be
broad. So it is compared with the coverage the same text would have if each passage, up to
`PASSAGE_TOKENS` long, had its own pool of the same size. Text of one domain comes close to that;
text of several domains does not, because its passages need different experts.

Both bounds were measured on the shipped models' held-out texts (benchmarks/accuracy/calibration.py,
the tables `mixture` and `amount`; its results file has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from emo_serve.facts import ModelFacts
from emo_serve.pools.calibration.examples import Documents
from emo_serve.pools.calibration.findings import Calibration

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

One domain is never reported as mixed; two are not where a pool is large enough for both.
"""
SHORTEST_TOLD = 32
"""Mean tokens per document below which mixtures are not reported: the best experts of a few tokens
are random, and no common pool comes close to them."""
TOKENS_PER_EXPERT = 8
"""Tokens for each expert of the largest layer, below which there is too little text.

That is 256 tokens for the shipped models, less than a page. Found on 16, 32, 64 and 256 tokens,
emo-demo's pools of 4 experts were 0.15, 0.04, 0.02 and 0.00 nats per token worse than those found
on 7,680; pools of 8 were 0.05, 0.02, 0.01 and 0.01. That the text needed grows in proportion to the
experts is an assumption.
"""


def passages(spans: Sequence[slice]) -> Iterator[slice]:
    """Cut each document into the fewest passages of at most PASSAGE_TOKENS, of equal length."""
    for span in spans:
        length = span.stop - span.start
        count = -(-length // PASSAGE_TOKENS)
        ends = [span.start + length * part // count for part in range(count + 1)]
        yield from (slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False))


def notes(found: Calibration, facts: ModelFacts) -> list[str]:
    """Return what a user should know before relying on the pool, one sentence each."""
    said: list[str] = []
    moes = [moe for moe in facts.moe_layers if moe is not None]
    fewest = TOKENS_PER_EXPERT * max(moe.num_experts for moe in moes)
    if found.documents and found.tokens < fewest and found.method != "random":
        said.append(
            f"{found.tokens} tokens are little text: with fewer than {fewest} (8 per expert of a"
            " layer) the choice is mostly random; add examples"
        )
    coverage, own = found.coverage, found.own_coverage
    is_told = found.tokens >= SHORTEST_TOLD * found.documents and found.method != "random"
    if is_told and coverage is not None and own is not None and coverage < MIXED_BOUND * own:
        said.append(
            f"the examples mix domains: this pool covers {coverage / own:.2f} of what a pool per"
            f" passage would ({own:.3f}), and one domain reaches at least {MIXED_BOUND}; build one"
            " pool per domain, or keep more experts"
        )
    top_k = max(moe.top_k for moe in moes)
    if found.k < top_k:
        said.append(
            f"the pool keeps {found.k} experts per layer, fewer than the {top_k} that a token takes"
        )
    return said


def cut_notes(documents: Documents) -> list[str]:
    """Return a note on documents that were too long, if there were any."""
    if not documents.num_cut:
        return []
    return [
        f"{documents.num_cut} of {len(documents.ids)} documents are longer than the model's context"
        f" of {documents.limit} tokens: at least {documents.tokens_cut} tokens were left out;"
        " split these documents to use them"
    ]
