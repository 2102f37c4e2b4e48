"""Split by document, remove repetitions, and measure how much held-out text occurs in training.

Order matters. The split comes first, by whole documents. Then held-out documents are processed
before training ones, and every run of lines already seen in an EARLIER document is dropped. So a
licence header or a copied function stays only in the first document that had it, and text of
held-out documents is removed from training. The remaining repetition is measured as the share of
held-out 32-grams that occur in training, and then cut out of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emo_serve.demo.training.documents import MIN_CHARACTERS, Document

__all__ = ["GRAM", "Split", "clean", "contamination", "cut_out", "grams", "split_documents"]

GRAM = 32  # tokens; the length whose repetition counts as seen
_RUN_LINES = 3
_RUN_CHARACTERS = 50  # shorter runs of lines ("}", "return None") repeat without being copies


@dataclass(frozen=True)
class Split:
    """The documents of one domain, split into held-out and training ones."""

    heldout: tuple[Document, ...]
    training: tuple[Document, ...]


def split_documents(
    documents: Iterable[Document], heldout_documents: int, training_bytes: int
) -> Split:
    """Split whole documents in the order of their names' hashes.

    The held-out part comes first and takes at most a tenth of the documents; training takes
    documents until it is full.
    """
    ordered = sorted(documents, key=lambda document: _hash(document.name))
    first = min(heldout_documents, len(ordered) // 10)
    training: list[Document] = []
    size = 0
    for document in ordered[first:]:
        if size >= training_bytes:
            break
        training.append(document)
        size += len(document.text.encode())
    return Split(tuple(ordered[:first]), tuple(training))


def clean(split: Split) -> Split:
    """Drop runs of lines seen in an earlier document, then documents with little left."""
    seen: set[bytes] = set()
    return Split(tuple(_unseen(split.heldout, seen)), tuple(_unseen(split.training, seen)))


def _unseen(documents: Iterable[Document], seen: set[bytes]) -> Iterable[Document]:
    for document in documents:
        lines = document.text.split("\n")
        filled = [i for i, line in enumerate(lines) if line.strip()]
        repeated: set[int] = set()
        new: set[bytes] = set()
        for first in range(len(filled) - _RUN_LINES + 1):
            run = filled[first : first + _RUN_LINES]
            text = "\n".join(lines[i].strip() for i in run)
            if len(text) < _RUN_CHARACTERS:
                continue
            key = _hash(text)
            new.add(key)
            if key in seen:
                repeated.update(run)
        seen |= new
        text = "\n".join(line for i, line in enumerate(lines) if i not in repeated)
        if len(text) >= MIN_CHARACTERS:
            yield Document(document.name, text)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


# -- token 32-grams --


def grams(ids: Sequence[int] | NDArray[np.int64], length: int = GRAM) -> NDArray[np.uint64]:
    """Return one 64-bit hash for each run of `length` tokens (fewer than `length`: none)."""
    array = np.asarray(ids, dtype=np.uint64)
    if len(array) < length:
        return np.empty(0, np.uint64)
    hashes = np.zeros(len(array) - length + 1, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(length):  # a polynomial hash with an odd multiplier, modulo 2**64
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + (
                array[offset : offset + len(hashes)] + np.uint64(1)
            )
            hashes ^= hashes >> np.uint64(29)
    return hashes


def contamination(
    heldout: Iterable[NDArray[np.int64]], training: Iterable[NDArray[np.int64]]
) -> float:
    """Return the share of the held-out documents' 32-grams that occur in a training document."""
    asked = np.concatenate([np.empty(0, np.uint64), *map(grams, heldout)])
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *map(grams, training)]))
    return float(np.isin(asked, known).mean()) if len(asked) else 0.0


def cut_out(document: NDArray[np.int64], heldout: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return what is left of a training document without the held-out 32-grams.

    `heldout` holds the sorted hashes of the held-out 32-grams. Every token that stands in one of
    them goes; the pieces before and after become documents of their own.
    """
    hits = np.flatnonzero(np.isin(grams(document), heldout))
    if not len(hits):
        return [document]
    keep = np.ones(len(document), bool)
    for hit in hits:
        keep[hit : hit + GRAM] = False
    edges = np.flatnonzero(np.diff(keep.astype(np.int8))) + 1
    starts = np.concatenate([[0], edges])
    pieces = np.split(document, edges)
    return [piece for start, piece in zip(starts, pieces, strict=True) if keep[start]]
