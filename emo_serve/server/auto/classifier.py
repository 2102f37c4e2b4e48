"""A linear text classifier: TF-IDF of character n-grams, one support vector machine per pool.

The simple alternative to the router. scikit-learn is an optional dependency (extra `auto`),
imported when a classifier is fitted. Fitting takes seconds for a few MB of text; a prompt takes a
millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["PoolClassifier", "is_installed"]

# benchmarks/accuracy/auto.py measures how often it is right; benchmarks/README.md ("tried, not
# kept") has the figures for whole examples and for equal weights per pool.
_NGRAMS = {"analyzer": "char_wb", "ngram_range": (1, 4), "sublinear_tf": True}
_MACHINE = {"class_weight": "balanced", "random_state": 0}


def is_installed() -> bool:
    """Tell whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


@dataclass(frozen=True)
class PoolClassifier:
    """A fitted classifier of at least two names; equal examples give equal classifiers."""

    names: tuple[str, ...]
    vectorizer: Any
    machine: Any

    @classmethod
    def fit(cls, examples: Mapping[str, Sequence[str]]) -> PoolClassifier:
        """Learn from texts by name, none of them blank; takes seconds, so run it in a thread."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC

        names = [name for name, texts in examples.items() for _ in texts]
        vectorizer, machine = TfidfVectorizer(**_NGRAMS), LinearSVC(**_MACHINE)
        texts = [text for group in examples.values() for text in group]
        machine.fit(vectorizer.fit_transform(texts), names)
        return cls(tuple(map(str, machine.classes_)), vectorizer, machine)

    def margins(self, text: str) -> dict[str, float]:
        """Return how far inside each name's half-space the text lies; below 0 is outside.

        Two names have one dividing plane, so one margin is the negative of the other.
        """
        found = self.machine.decision_function(self.vectorizer.transform([text]))
        row = [-found[0], found[0]] if len(self.names) == 2 else found[0]
        return {name: float(margin) for name, margin in zip(self.names, row, strict=True)}
