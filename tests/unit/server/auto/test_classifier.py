"""The classifier of text: what it learns, and that it learns the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from emo_serve import demo
from emo_serve.server.auto.classifier import PoolClassifier, counts_of, counts_of_asking, merged

EXAMPLES = {
    "sums": ["1 + 1 = 2", "3 + 4 = 7"],
    "words": ["the cat sat on the mat"],
    "greek": ["\u03b1\u03b2\u03b3 \u03b4\u03b5"],
}


def fitted(examples: Mapping[str, Sequence[str]]) -> PoolClassifier:
    return PoolClassifier.fit({name: counts_of(texts) for name, texts in examples.items()})


@pytest.mark.parametrize("names", [("sums", "words"), ("sums", "words", "greek")])
def test_each_name_has_a_margin_and_the_right_one_is_the_largest(names: tuple[str, ...]) -> None:
    classifier = fitted({name: EXAMPLES[name] for name in names})
    for name in names:
        margins = classifier.margins(EXAMPLES[name][0])
        assert set(margins) == set(names)
        assert max(margins, key=margins.__getitem__) == name
        assert margins[name] > 0


def test_the_same_examples_give_the_same_classifier() -> None:
    first, second = (fitted(EXAMPLES) for _ in range(2))
    assert first.margins("7 cats + 1") == second.margins("7 cats + 1")


def test_the_middle_of_a_text_is_learned_and_not_only_its_beginning() -> None:
    header = "# the same words begin both files\n" * 20
    texts = {
        "fruit": [header + "apple pear plum\n" * 20],
        "tools": [header + "hammer nails saw\n" * 20],
    }
    classifier = fitted(texts)
    for name, text in (("fruit", "a ripe pear"), ("tools", "one hammer")):
        margins = classifier.margins(text)
        assert max(margins, key=margins.__getitem__) == name


def test_a_pool_can_be_asked_for_by_its_name() -> None:
    texts = {"python": ["import os\nos.path"], "spanish": ["hola que tal"], "sums": ["1 + 1 = 2"]}
    parts = {name: [counts_of(some), counts_of_asking(name)] for name, some in texts.items()}
    classifier = PoolClassifier.fit({name: merged(some) for name, some in parts.items()})
    for name in texts:
        margins = classifier.margins(f"please write it in {name} for me")
        assert max(margins, key=margins.__getitem__) == name


def test_the_shipped_texts_are_told_apart() -> None:
    texts = {domain: demo.heldout(domain) for domain in demo.domains()}
    classifier = fitted({name: some[::4] for name, some in texts.items()})
    asked = [(name, text[:200]) for name, some in texts.items() for text in some[1::8]]
    margins = [classifier.margins(text) for _, text in asked]
    right = [max(m, key=m.__getitem__) == name for (name, _), m in zip(asked, margins, strict=True)]
    assert len(right) > 50
    assert sum(right) / len(right) > 0.95
