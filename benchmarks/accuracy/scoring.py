"""Log-probabilities of given tokens over HTTP, and the figures made of them.

`/v1/completions` with `prompt_logprobs: 0` answers, for each prompt token but the first, its
log-probability and rank. Prompts travel as ids, so nothing depends on how a server tokenizes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from benchmarks.accuracy.texts import Domain, Question

__all__ = ["Endpoint", "Score", "Token", "score_domain", "standard_error"]

_PROMPTS_A_REQUEST = 48
_REQUESTS_AT_ONCE = 2  # one is computed while the other's answer is written and read


@dataclass(frozen=True)
class Token:
    """What a model said of an actual token; rank 1 is its first choice, ties count against it."""

    logprob: float
    rank: int


@dataclass(frozen=True)
class Score:
    """A pool on a domain; `losses` are nats per token, one per text, all texts of equal length.

    `accuracy` is the share of tokens that were the model's first choice, `choices` the share of
    questions answered right; None without questions.
    """

    losses: tuple[float, ...]
    accuracy: float
    choices: float | None

    @property
    def loss(self) -> float:
        """Return the mean over the texts."""
        return statistics.mean(self.losses)


class Endpoint:
    """A server's OpenAI endpoint and its pools; `http` is its caller's to close."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.url = str(http.base_url).rstrip("/")

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON of an answer; anything but success ends the benchmark with the reason."""
        response = self.http.request(method, path, **options)
        if response.status_code // 100 != 2:
            raise SystemExit(f"{method} {path}: {response.status_code} {response.text[:500]}")
        return response.json()

    def score(self, model: str, prompts: Sequence[Sequence[int]]) -> list[list[Token]]:
        """Return each prompt's tokens except its first, as the pool `model` scores them."""
        parts = [
            prompts[start : start + _PROMPTS_A_REQUEST]
            for start in range(0, len(prompts), _PROMPTS_A_REQUEST)
        ]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
            answers = threads.map(lambda part: self._score_part(model, part), parts)
            return [tokens for answer in answers for tokens in answer]

    def _score_part(self, model: str, prompts: Sequence[Sequence[int]]) -> list[list[Token]]:
        body = {
            "model": model,
            "prompt": [list(ids) for ids in prompts],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        choices = self.ask("POST", "/v1/completions", json=body)["choices"]
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return [
            _tokens(choice["prompt_logprobs"], ids)
            for choice, ids in zip(ordered, prompts, strict=True)
        ]


def _tokens(entries: Sequence[dict[str, Any] | None], ids: Sequence[int]) -> list[Token]:
    pairs = list(zip(entries, ids, strict=True))[1:]  # nothing comes before the first
    found = [(entry or {})[str(token)] for entry, token in pairs]
    return [Token(entry["logprob"], entry["rank"]) for entry in found]


def score_domain(endpoint: Endpoint, model: str, domain: Domain) -> Score:
    """Score a domain's measured texts and questions in one pool."""
    texts = endpoint.score(model, [text.ids for text in domain.measured])
    prompts = [prompt for question in domain.questions for prompt in question.prompts]
    answers = iter(endpoint.score(model, prompts))
    right = [
        is_right(question, [next(answers) for _ in question.prompts])
        for question in domain.questions
    ]
    return Score(
        losses=tuple(-statistics.mean(token.logprob for token in tokens) for tokens in texts),
        accuracy=statistics.mean(token.rank == 1 for tokens in texts for token in tokens),
        choices=statistics.mean(right) if right else None,
    )


def is_right(question: Question, scored: Sequence[Sequence[Token]]) -> bool:
    """Tell whether the right choice has the highest total log-likelihood; a tie is wrong."""
    totals = [
        math.fsum(token.logprob for token in tokens[start - 1 :])
        for tokens, start in zip(scored, question.starts, strict=True)
    ]
    best = totals.pop(question.answer)
    return best > max(totals)


def standard_error(losses: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the standard error of the mean difference, text by text."""
    differences = [mine - other for mine, other in zip(losses, baseline, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))
