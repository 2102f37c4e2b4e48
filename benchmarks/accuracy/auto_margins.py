"""Where the weights and margins of `auto` come from: the examples alone, never the measured texts.

The examples of each domain (`accuracy/texts.py`) are split by document into folds. Each fold's
beginnings are asked of a classifier that learned from the other folds, and of the router: the
reference model in plain torch, in the base pool and in the pool of the shared experts alone. Then
each domain is left out in turn, from the classifier and from the pools, and its texts are those of
an unknown domain.

Printed is how often each method alone is right, and its loss above that in the text's own pool,
nats per token over the 128 tokens that follow; then the same of the vote by weight of the router,
by lead of the classifier below which the router is asked (and how often that is), by lead of the
vote and by margin of its first below which the base pool is taken, and of the classifier alone
(--auto-method tfidf) by margin below which it is; in brackets how many texts of known and of
unknown domains get the base pool.

    python -m benchmarks.accuracy.auto_margins
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from emo_serve.names import BASE_POOL
from emo_serve.pools.document import read_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_classifier import MIN_MARGIN
from emo_serve.server.auto.by_router import coverages
from emo_serve.server.auto.by_vote import (
    LEAST_MARGIN,
    ROUTER_WEIGHT,
    SURE_LEAD,
    UNSURE_LEAD,
)
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
_FOLLOW = 128  # tokens after the prompt, for the loss
_WEIGHTS = (0.0, 1.0, 2.0, ROUTER_WEIGHT, 3.0, 4.0, 8.0)
_LEADS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_MARGINS = (-0.5, MIN_MARGIN, 0.0)
_BASE_LEADS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
_LEAST = (-0.4, -0.5, LEAST_MARGIN, -0.75, -9.0)
_MIN_COVERAGE = 0.4  # the default of --auto-min-coverage

Votes = Mapping[str, float]


class Asked(NamedTuple):
    """A beginning of a text: its domain, its length, what the classifier says, and the router."""

    domain: str
    tokens: int
    margins: Votes
    shares: Mapping[str, Votes]  # by base pool: resident, not resident
    losses: Votes  # by pool, over the tokens that follow; the base pool's under its own name


class Router:
    """The model's router, asked for every pool's coverage of a prompt."""

    def __init__(self, model: EmoForCausalLM, pools: Sequence[ExpertPool]) -> None:
        self._model, self._pools, self._moes = model, pools, model.config.moe_layers
        self._trunk = self._masks([moe and moe.smallest_pool for moe in self._moes])
        self._named = {BASE_POOL: None, **{p.name: self._masks(p.expert_ids) for p in pools}}

    def shares(self, ids: Sequence[int]) -> dict[str, Votes]:
        """Return each pool's share of the mass, seen from the base pool and from the trunk."""
        return {
            "resident": self._seen_from(ids, None),
            "not resident": self._seen_from(ids, self._trunk),
        }

    def losses(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return each pool's loss of every token but the first, and the base pool's."""
        ids_1T = torch.tensor([list(ids)])
        found: dict[str, torch.Tensor] = {}
        for name, pool in self._named.items():
            with torch.no_grad():
                logits_TV = self._model(ids_1T, pool=pool)[0, :-1].float()
            found[name] = torch.nn.functional.cross_entropy(
                logits_TV, ids_1T[0, 1:], reduction="none"
            )
        return found

    def _masks(self, experts: Sequence[Sequence[int] | None]) -> list[torch.Tensor | None]:
        return [
            None if moe is None or ids is None else _mask(moe.num_experts, ids)
            for moe, ids in zip(self._moes, experts, strict=True)
        ]

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
            by_token = router.losses(text.ids[: max(_LENGTHS) + _FOLLOW])
            for length in _LENGTHS:
                after = slice(length - 1, length - 1 + _FOLLOW)
                losses = {name: float(loss[after].mean()) for name, loss in by_token.items()}
                ids = text.ids[:length]
                prompt, shares = tokenizer.decode(ids), router.shares(ids)
                margins = fitted[folds[domain.name][place]].margins(prompt)
                known.append(Asked(domain.name, length, margins, shares, losses))
                others = {
                    base: {name: share for name, share in some.items() if name != domain.name}
                    for base, some in shares.items()
                }
                margins = strangers[domain.name].margins(prompt)
                unknown.append(Asked(domain.name, length, margins, others, losses))
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


def chosen(
    asked: Asked,
    base: str,
    weight: float = ROUTER_WEIGHT,
    sure: float = SURE_LEAD,
    unsure: float = UNSURE_LEAD,
    least: float = LEAST_MARGIN,
) -> str:
    """Return the vote's choice; the router votes where the classifier leads by less than `sure`."""
    votes = vote(asked, base, 0.0)
    if lead(votes) < sure:
        votes = vote(asked, base, weight)
    is_unsure = lead(votes) < unsure or asked.margins[votes[0][1]] < least
    return BASE_POOL if base == "resident" and is_unsure else votes[0][1]


def router_alone(asked: Asked, base: str, least: float) -> str:
    """Return the router's choice; the base pool, if resident, where no coverage is `least`."""
    return _first(asked.shares[base], base, least)


def classifier_alone(asked: Asked, base: str, least: float) -> str:
    """Return the classifier's choice; the base pool, if resident, where no margin is `least`."""
    return _first(asked.margins, base, least)


def _first(votes: Votes, base: str, least: float) -> str:
    first = max(votes, key=votes.__getitem__)
    return BASE_POOL if base == "resident" and votes[first] < least else first


def rows_of(known: Sequence[Asked], unknown: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return a row of tables per base and length."""
    return [
        row_of(base, tokens, *([a for a in of if a.tokens == tokens] for of in (known, unknown)))
        for base in ("resident", "not resident")
        for tokens in _LENGTHS
    ]


def row_of(
    base: str, tokens: int, known: Sequence[Asked], unknown: Sequence[Asked]
) -> dict[str, Any]:
    """Return one row; each table has a `cell` per value that was tried."""

    def told(choose: Callable[..., str], name: str, values: Sequence[float]) -> dict[float, Any]:
        tried = {value: partial(choose, base=base, **{name: value}) for value in values}
        return {value: cell(known, unknown, choice) for value, choice in tried.items()}

    leads = [lead(vote(asked, base, 0.0)) for asked in known]
    return {
        "base": base,
        "tokens": tokens,
        "router": told(router_alone, "least", [_MIN_COVERAGE]),
        "tfidf": told(classifier_alone, "least", _MARGINS),
        "weight": told(chosen, "weight", _WEIGHTS),
        "sure": told(chosen, "sure", _LEADS),
        "unsure": told(chosen, "unsure", _BASE_LEADS),
        "least": told(chosen, "least", _LEAST),
        "asked": {sure: mean(lead < sure for lead in leads) for sure in _LEADS},
    }


def cell(
    known: Sequence[Asked], unknown: Sequence[Asked], choose: Callable[[Asked], str]
) -> dict[str, float]:
    """Return the share right, loss above own, and the shares of known and unknown sent to base."""
    choices = [(asked, choose(asked)) for asked in known]
    return {
        "right": mean(name == asked.domain for asked, name in choices),
        "above_own": mean(asked.losses[n] - asked.losses[asked.domain] for asked, n in choices),
        "to_base": mean(name == BASE_POOL for _, name in choices),
        "unknown_to_base": mean(choose(asked) == BASE_POOL for asked in unknown),
    }


def mean(values: Any) -> float:
    """Return the mean; of claims, the share that is true."""
    return statistics.mean(map(float, values))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables."""
    for row in rows:
        print(f"\nbase {row['base']}, {row['tokens']} tokens")
        for title in ("router", "tfidf", "weight", "sure", "unsure", "least"):
            print(f" {title}:", *(f"{at}: {_told(of)};" for at, of in row[title].items()))
        print(" router asked:", *(f"{at}: {share:.3f};" for at, share in row["asked"].items()))


def _told(of: Mapping[str, float]) -> str:
    return (
        f"{of['right']:.3f} {of['above_own']:+.4f}"
        f" ({of['to_base']:.3f}, {of['unknown_to_base']:.3f} base)"
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
    used["least_margin"] = LEAST_MARGIN
    print(f"\nappended to {append_result('auto_margins', vars(args), {**used, 'rows': rows})}")


if __name__ == "__main__":
    main()
