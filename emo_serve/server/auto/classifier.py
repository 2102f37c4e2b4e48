"""A linear text classifier: TF-IDF of character n-grams, one support vector machine per pool.

The simple alternative to the router. It learns from counts of hashed n-grams, which can be kept
without the texts they come from. scikit-learn is an optional dependency (extra `auto`), imported
when texts are counted. Fitting takes seconds for a few MB of text; a prompt takes a millisecond.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

__all__ = [
    "Counts",
    "PoolClassifier",
    "counts_of",
    "counts_of_asking",
    "is_installed",
    "merged",
    "read_counts",
    "write_counts",
]

# benchmarks/accuracy/auto.py measures how often it is right; benchmarks/README.md ("tried, not
# kept") has the figures for other pieces of text and for equal weights per pool.
_NGRAMS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (1, 4), "n_features": 2**18}
_MACHINE: dict[str, Any] = {"class_weight": "balanced", "random_state": 0}
_BEGINNINGS = (12, 25, 50, 100, 200, 400)
"""Prompts are short, so each text is learned at these lengths, too, in characters."""

_INSIDE = (25, 50, 100, 200)
_MOST_INSIDE = 10
"""And they begin anywhere, so up to ten pieces of each of these lengths begin at its lines."""

_ASKING = (
    "{name}",
    "write {name}",
    "in {name}",
    "a {name} function",
    "how do I do this in {name}?",
    "{name} code for this",
    "write a {name} program that",
    "explain this in {name}",
    "please give me the {name} for",
    "what is {name}?",
)
"""How people ask for something by name, rather than begin it."""

_KIND = f"emo-serve counts 1: {_NGRAMS}"
_PARTS = ("data", "indices", "indptr", "shape")


def is_installed() -> bool:
    """Tell whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each hashed n-gram occurs: a sparse matrix, a row per text or beginning of one."""

    matrix: Any


def counts_of(texts: Sequence[str]) -> Counts:
    """Count the n-grams of texts, none of them blank, and of beginnings in them."""
    return Counts(_vectorizer().transform([piece for text in texts for piece in _pieces(text)]))


def counts_of_asking(name: str) -> Counts:
    """Count the n-grams of ways to ask for what a pool is named after."""
    return Counts(_vectorizer().transform([asking.format(name=name) for asking in _ASKING]))


def merged(parts: Sequence[Counts]) -> Counts:
    """Return the counts of all these texts."""
    from scipy.sparse import vstack

    return Counts(vstack([part.matrix for part in parts], format="csr"))


@dataclass(frozen=True)
class PoolClassifier:
    """A fitted classifier of at least two names; equal examples give equal classifiers."""

    names: tuple[str, ...]
    weights: Any
    machine: Any

    @classmethod
    def fit(cls, examples: Mapping[str, Counts]) -> PoolClassifier:
        """Learn from counts by name; takes seconds, so run it in a thread."""
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.svm import LinearSVC

        rows = [counts.matrix for counts in examples.values()]
        names = [n for n, some in zip(examples, rows, strict=True) for _ in range(some.shape[0])]
        weights, machine = TfidfTransformer(sublinear_tf=True), LinearSVC(**_MACHINE)
        machine.fit(weights.fit_transform(vstack(rows)), names)
        return cls(tuple(map(str, machine.classes_)), weights, machine)

    def margins(self, text: str) -> dict[str, float]:
        """Return how far inside each name's half-space the text lies; below 0 is outside.

        Two names have one dividing plane, so one margin is the negative of the other.
        """
        counted = self.weights.transform(_vectorizer().transform([text]))
        found = self.machine.decision_function(counted)
        row = [-found[0], found[0]] if len(self.names) == 2 else found[0]
        return {name: float(margin) for name, margin in zip(self.names, row, strict=True)}


# -- as a file --


def write_counts(counts: Counts, file: IO[bytes]) -> None:
    """Write counts as the content of a .npz file."""
    import numpy as np

    parts = {part: getattr(counts.matrix, part) for part in _PARTS}
    np.savez_compressed(file, kind=np.array(_KIND), **parts)


def read_counts(path: Path) -> Counts:
    """Read what `write_counts` wrote; raises ValueError for anything else, OSError."""
    import numpy as np
    from scipy.sparse import csr_matrix

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
            if str(parts["kind"]) != _KIND:
                raise ValueError(f"{path.name} was written by another version")
            values = (parts["data"], parts["indices"], parts["indptr"])
            matrix = csr_matrix(values, shape=tuple(parts["shape"]))
            matrix.check_format()
    except (KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} does not hold counts: {error}") from error
    if matrix.shape[1] != _NGRAMS["n_features"] or not matrix.shape[0]:
        raise ValueError(f"{path.name} holds counts of shape {matrix.shape}")
    return Counts(matrix)


@cache
def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(**_NGRAMS, alternate_sign=False, norm=None)


def _pieces(text: str) -> list[str]:
    """Return a text, its beginnings, and pieces that begin at lines spread over it."""
    beginnings = [text[:length] for length in _BEGINNINGS if length < len(text)]
    starts = [line.end() for line in re.finditer("\n", text)]
    for length in _INSIDE:
        whole = [start for start in starts if start + length <= len(text)]
        some = whole[:: max(1, len(whole) // _MOST_INSIDE)][:_MOST_INSIDE]
        beginnings += [text[start : start + length] for start in some]
    return [text, *(piece for piece in beginnings if piece.strip())]
