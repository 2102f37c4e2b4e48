"""Where the weights and margins of `auto` come from: the examples alone, never the measured texts.

The examples of each domain (`accuracy/texts.py`) are split by document into folds. Each fold's
beginnings are asked of a classifier that learned from the other folds, and of the router: the
reference model in plain torch, in the base pool and in the pool of the shared experts alone. Then
each domain is left out in turn, from the classifier and from the pools, and its texts are those of
an unknown domain.

Printed by weight of the router in the vote: how often it is right. By lead of the classifier below
which the router is asked: how often that is, and how often the vote is right. By lead of the vote
below which the base pool is taken: how many texts of known and of unknown domains get it. By margin
of the classifier alone (--auto-method tfidf): the same.

    python -m benchmarks.accuracy.auto_margins
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.accuracy.texts import Domain, read_domain
from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.emo.routing import router_probabilities
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.pools.document import read_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_classifier import MIN_MARGIN
from emo_serve.server.auto.by_router import coverages
from emo_serve.server.auto.by_vote import ROUTER_WEIGHT, SURE_LEAD, UNSURE_LEAD
from emo_serve.server.auto.classifier import (
    Counts,
    PoolClassifier,
    counts_of,
    counts_of_asking,
    merged,
)
from emo_serve.vllm_plugin.contract import RouterMass

_FOLDS = 5
_LENGTHS = (8, 16, 32, 64)
_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
_LEADS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 9.0)
_MARGINS = (-0.5, MIN_MARGIN, 0.0)
_BASE_LEADS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)

Votes = Mapping[str, float]


class Asked(NamedTuple):
    """A beginning of a text: its domain, its length, what the classifier says, and the router."""

    domain: str
    tokens: int
    margins: Votes
    shares: Mapping[str, Votes]  # by base pool: resident, not resident


class Router:
    """The model's router, asked for every pool's coverage of a prompt."""

    def __init__(self, model: EmoForCausalLM, pools: Sequence[ExpertPool]) -> None:
        self._model, self._pools, self._moes = model, pools, model.config.moe_layers
        self._trunk = [
            None if moe is None else _mask(moe.num_experts, moe.smallest_pool) for moe in self._moes
        ]

    def shares(self, ids: Sequence[int]) -> dict[str, Votes]:
        """Return each pool's share of the mass, seen from the base pool and from the trunk."""
        return {
            "resident": self._seen_from(ids, None),
            "not resident": self._seen_from(ids, self._trunk),
        }

    def _seen_from(self, ids: Sequence[int], pool: Any) -> Votes:
        record: list[RouterRecord] = []
        with torch.no_grad():
            self._model(torch.tensor([list(ids)]), pool=pool, record=record)
        layers: list[tuple[float, ...]] = [()] * len(self._moes)
        for layer in record:
            moe = self._moes[layer.layer]
            assert moe is not None
            logits_TE = layer.logits_BTE.reshape(-1, layer.logits_BTE.shape[-1])
            layers[layer.layer] = tuple(router_probabilities(logits_TE, moe).sum(0).tolist())
        found = coverages(RouterMass(len(ids), tuple(layers)), self._pools, self._moes)
        return {pool.name: share for pool, share in zip(self._pools, found, strict=True)}


def _mask(count: int, experts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([expert in experts for expert in range(count)])


# -- asking --


def ask(args: argparse.Namespace) -> tuple[list[Asked], list[Asked]]:
    """Return what is said of texts of known domains, and of unknown ones."""
    tokenizer, model = ModelTokenizer(args.model), load_model(args.model)
    paths = sorted(args.texts.glob("*.jsonl"))
    domains = [read_domain(path, tokenizer.encode, 64, 1, None) for path in paths]
    pools = [read_pool(path) for path in sorted(args.pools.glob("*.json"))]
    router = Router(model, [pool.complete(model.config.moe_layers) for pool in pools])
    texts = {d.name: [tokenizer.decode(text.ids) for text in d.examples] for d in domains}
    counts = {name: [counts_of([text]) for text in some] for name, some in texts.items()}
    folds = {domain.name: fold_of(domain) for domain in domains}
    known, unknown = [], []
    fitted = [
        fit(counts, lambda name, place, fold=fold: folds[name][place] != fold)
        for fold in range(_FOLDS)
    ]
    strangers = {
        d.name: fit(counts, lambda name, place, without=d.name: name != without) for d in domains
    }
    for domain in steps(domains, "domains"):
        for place, text in enumerate(domain.examples):
            for length in _LENGTHS:
                ids = text.ids[:length]
                prompt, shares = tokenizer.decode(ids), router.shares(ids)
                margins = fitted[folds[domain.name][place]].margins(prompt)
                known.append(Asked(domain.name, length, margins, shares))
                others = {
                    base: {name: share for name, share in some.items() if name != domain.name}
                    for base, some in shares.items()
                }
                margins = strangers[domain.name].margins(prompt)
                unknown.append(Asked(domain.name, length, margins, others))
    return known, unknown


def fold_of(domain: Domain) -> list[int]:
    """Return each example's fold; those of one document are in one."""
    documents = list(dict.fromkeys(text.document for text in domain.examples))
    return [documents.index(text.document) % _FOLDS for text in domain.examples]


def fit(
    counts: Mapping[str, Sequence[Counts]], is_used: Callable[[str, int], bool]
) -> PoolClassifier:
    """Fit a classifier on some of the texts."""
    used = {
        name: [some for place, some in enumerate(texts) if is_used(name, place)]
        for name, texts in counts.items()
    }
    return PoolClassifier.fit(
        {name: merged([*some, counts_of_asking(name)]) for name, some in used.items() if some}
    )


# -- votes --


def vote(asked: Asked, base: str, weight: float) -> list[tuple[float, str]]:
    """Return the votes, the most first."""
    shares = asked.shares[base]
    found = [(margin + weight * shares[name], name) for name, margin in asked.margins.items()]
    return sorted(found, reverse=True)


def lead(votes: Sequence[tuple[float, str]]) -> float:
    """Return by how much the first is ahead of the second."""
    return votes[0][0] - votes[1][0]


def chosen(asked: Asked, base: str, sure: float, weight: float) -> list[tuple[float, str]]:
    """Return the classifier's votes where it leads by `sure`, else those of both."""
    alone = vote(asked, base, 0.0)
    return alone if lead(alone) >= sure else vote(asked, base, weight)


def rows_of(known: Sequence[Asked], unknown: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return the three tables, as rows."""
    rows: list[dict[str, Any]] = []
    for base in ("resident", "not resident"):
        for tokens in _LENGTHS:
            of = [asked for asked in known if asked.tokens == tokens]
            strange = [asked for asked in unknown if asked.tokens == tokens]
            row: dict[str, Any] = {"base": base, "tokens": tokens}
            row["router"] = mean(first(a.shares[base]) == a.domain for a in of)
            row["weight"] = {
                w: mean(vote(a, base, w)[0][1] == a.domain for a in of) for w in _WEIGHTS
            }
            row["sure"] = {
                s: (
                    mean(lead(vote(a, base, 0.0)) < s for a in of),
                    mean(chosen(a, base, s, ROUTER_WEIGHT)[0][1] == a.domain for a in of),
                )
                for s in _LEADS
            }
            row["to_base"] = {
                b: tuple(
                    mean(lead(chosen(a, base, SURE_LEAD, ROUTER_WEIGHT)) < b for a in some)
                    for some in (of, strange)
                )
                for b in _BASE_LEADS
            }
            row["alone"] = {
                m: tuple(mean(max(a.margins.values()) < m for a in some) for some in (of, strange))
                for m in _MARGINS
            }
            rows.append(row)
    return rows


def first(votes: Votes) -> str:
    """Return the name of the most votes."""
    return max(votes, key=votes.__getitem__)


def mean(values: Any) -> float:
    """Return the share that is true."""
    return statistics.mean(map(float, values))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables."""
    for row in rows:
        print(f"\nbase {row['base']}, {row['tokens']} tokens: router alone {row['router']:.3f}")
        print(" right, by weight:", {w: f"{r:.3f}" for w, r in row["weight"].items()})
        for title, cells in (
            ("asked, right, by lead:", row["sure"]),
            ("to base, known, unknown:", row["to_base"]),
            ("classifier alone, to base, known, unknown:", row["alone"]),
        ):
            print(
                "", title, {key: " ".join(f"{v:.3f}" for v in cell) for key, cell in cells.items()}
            )


def main() -> None:
    """Ask, print, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--model", type=Path, default=demo.model_dir(), help="[the shipped one]")
    add("--texts", type=Path, default=demo.heldout_dir(), help="DOMAIN.jsonl each [the shipped]")
    add("--pools", type=Path, default=demo.pools_dir(), help="[the shipped]")
    add("--threads", type=int, default=2, help="[2]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = rows_of(*ask(args))
    show(rows)
    used = {"router_weight": ROUTER_WEIGHT, "sure_lead": SURE_LEAD, "unsure_lead": UNSURE_LEAD}
    print(f"\nappended to {append_result('auto_margins', vars(args), {**used, 'rows': rows})}")


if __name__ == "__main__":
    main()
