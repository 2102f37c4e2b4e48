"""Split by document, dedup of line runs, and the 32-gram arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.demo.training.cleaning import (
    GRAM,
    clean,
    contamination,
    cut_out,
    grams,
    split_documents,
)
from emo_serve.demo.training.documents import Document

HEADER = "# Copyright somebody, all rights reserved.\n# Licensed under a licence.\n# Do read it.\n"


def _text(seed: int, lines: int = 60) -> str:
    return "\n".join(f"line {seed * 1000 + i} says something of its own" for i in range(lines))


def _documents(count: int) -> list[Document]:
    return [Document(f"file {i}", _text(i)) for i in range(count)]


# -- split --


def test_split_keeps_documents_whole_and_apart() -> None:
    documents = _documents(50)
    split = split_documents(documents, heldout_documents=4, training_bytes=10**9)
    assert len(split.heldout) == 4
    assert len(split.training) == 46
    assert sorted(d.name for d in split.heldout + split.training) == sorted(
        d.name for d in documents
    )
    assert set(split.heldout + split.training) == set(documents)


def test_split_holds_out_a_tenth_at_most() -> None:
    split = split_documents(_documents(20), heldout_documents=40, training_bytes=10**9)
    assert len(split.heldout) == 2


def test_split_depends_on_names_not_on_order() -> None:
    documents = _documents(50)
    forward = split_documents(documents, 5, 20_000)
    backward = split_documents(documents[::-1], 5, 20_000)
    assert forward == backward


def test_split_stops_at_the_training_size() -> None:
    documents = _documents(50)
    size = len(documents[0].text.encode())
    split = split_documents(documents, 5, training_bytes=3 * size)
    assert 3 <= len(split.training) <= 4


# -- cleaning --


def test_a_repeated_header_stays_in_the_first_document_only() -> None:
    documents = [Document(f"file {i}", HEADER + _text(i)) for i in range(40)]
    split = clean(split_documents(documents, 4, 10**9))
    holders = [d for d in split.heldout + split.training if "Copyright" in d.text]
    assert holders == [split.heldout[0]]


def test_what_a_heldout_document_says_is_gone_from_training() -> None:
    split = split_documents(_documents(40), 4, 10**9)
    copied = "\n".join(split.heldout[0].text.split("\n")[10:20])
    tainted = Document("tainted", _text(99) + "\n" + copied + "\n" + _text(98))
    cleaned = clean(type(split)(split.heldout, (*split.training, tainted)))
    (left,) = [d for d in cleaned.training if d.name == "tainted"]
    assert copied not in left.text
    assert _text(99) in left.text
    assert _text(98) in left.text
    assert cleaned.heldout == split.heldout


def test_a_copy_of_a_whole_document_disappears() -> None:
    split = split_documents(_documents(40), 4, 10**9)
    copy = Document("copy", split.training[0].text)
    cleaned = clean(type(split)(split.heldout, (*split.training, copy)))
    assert "copy" not in {d.name for d in cleaned.training}


def test_short_runs_may_repeat() -> None:
    braces = "}\n}\n}\n"
    documents = [Document(f"file {i}", _text(i) + "\n" + braces) for i in range(40)]
    split = clean(split_documents(documents, 4, 10**9))
    assert all(d.text.endswith(braces) for d in split.training)


# -- token 32-grams --

ids = st.lists(st.integers(0, 3), max_size=120)


def _windows(tokens: list[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)}


@given(ids, ids)
def test_contamination_is_the_share_of_heldout_windows_seen(
    heldout: list[int], training: list[int]
) -> None:
    windows = [tuple(heldout[i : i + GRAM]) for i in range(len(heldout) - GRAM + 1)]
    seen = _windows(training)
    expected = sum(w in seen for w in windows) / len(windows) if windows else 0.0
    found = contamination([np.array(heldout, int)], [np.array(training, int)])
    assert found == pytest.approx(expected)


@given(st.lists(st.integers(0, 3000), min_size=40, max_size=200), st.data())
def test_nothing_heldout_survives_the_cut(training: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(training) - GRAM))
    stop = data.draw(st.integers(start + GRAM, len(training)))
    heldout = np.unique(grams(training[start:stop]))
    pieces = cut_out(np.array(training), heldout)
    assert not any(np.isin(grams(piece), heldout).any() for piece in pieces)
    kept = sum(map(len, pieces))
    assert kept <= len(training) - (stop - start)


def test_an_untouched_document_comes_back_whole() -> None:
    document = np.arange(100)
    (piece,) = cut_out(document, np.unique(grams(np.arange(1000, 1100))))
    assert (piece == document).all()


def test_the_cut_takes_exactly_the_shared_tokens() -> None:
    document = np.arange(200)
    pieces = cut_out(document, np.unique(grams(np.arange(50, 100))))
    assert [(piece[0], piece[-1]) for piece in pieces] == [(0, 49), (100, 199)]
