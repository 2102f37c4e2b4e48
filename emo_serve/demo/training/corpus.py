"""Build the corpus: documents, split, cleaning, tokenizer, token arrays, held-out texts, report.

Everything lands in one working directory:

    sources/                 unpacked packages (see `sources`)
    tokenizer.json           the BPE, learnt from training documents only
    tokens.npz               <domain>.ids and <domain>.ends: training documents, end to end
    heldout/<domain>.jsonl   the texts that ship: {"document": name, "text": text}
    corpus.json              what came of it: documents, bytes, tokens, contamination
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from emo_serve.demo.training.cleaning import (
    Split,
    clean,
    contamination,
    cut_out,
    grams,
    split_documents,
)
from emo_serve.demo.training.documents import READERS, Document
from emo_serve.demo.training.sources import SOURCES, fetch
from emo_serve.demo.training.tokenizer import END_OF_TEXT_ID, train_tokenizer

__all__ = ["HELDOUT_TOKENS", "DomainReport", "build_corpus", "heldout_texts"]

logger = logging.getLogger(__name__)

_HELDOUT_DOCUMENTS = 40
_HELDOUT_TEXTS = 48  # texts shipped per domain
HELDOUT_TOKENS = 384  # every held-out text has at least so many, at most 512
_MAX_TEXT_TOKENS = 512
_TRAINING_BYTES = 4_000_000
_TOKENIZER_BYTES = 1_200_000  # a domain's share of the tokenizer's training text
_ARITHMETIC_TOKENIZER_BYTES = 150_000  # few distinct words; more would teach nothing


@dataclass(frozen=True)
class DomainReport:
    """Statistics of one domain's text; contaminations are shares of held-out 32-grams."""

    domain: str
    documents: int
    heldout_documents: int
    heldout_texts: int
    training_bytes: int
    training_tokens: int
    bytes_per_token: float
    contamination_raw: float
    contamination_cleaned: float
    contamination_final: float


def build_corpus(directory: Path) -> list[DomainReport]:
    """Write the corpus's files into `directory` and return the report, one row per domain."""
    (directory / "sources").mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        fetch(source, directory / "sources")
    raw: dict[str, Split] = {}
    for domain, read in READERS.items():
        raw[domain] = split_documents(
            read(directory / "sources"), _HELDOUT_DOCUMENTS, _TRAINING_BYTES
        )
        logger.info("%s: %d documents read", domain, len(raw[domain].training))
    cleaned = {domain: clean(split) for domain, split in raw.items()}
    tokenizer = train_tokenizer(_tokenizer_texts(cleaned))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "heldout").mkdir(exist_ok=True)
    arrays: dict[str, NDArray[np.int64]] = {}
    reports = []
    for domain, split in cleaned.items():
        report, pieces = _finish(domain, raw[domain], split, tokenizer, directory / "heldout")
        arrays[f"{domain}.ids"] = np.concatenate(pieces).astype(np.uint16)
        arrays[f"{domain}.ends"] = np.cumsum([len(piece) for piece in pieces])
        reports.append(report)
        logger.info("%s", report)
    np.savez(directory / "tokens.npz", allow_pickle=False, **arrays)
    (directory / "corpus.json").write_text(json.dumps([asdict(r) for r in reports], indent=1))
    return reports


def heldout_texts(
    documents: tuple[Document, ...], tokenizer: Tokenizer, texts: int = _HELDOUT_TEXTS
) -> Iterator[tuple[str, str]]:
    """Yield (document, text) pairs of whole lines, spread over the documents.

    Each text has HELDOUT_TOKENS to _MAX_TEXT_TOKENS tokens; texts of one document do not overlap.
    """
    candidates = [_windows(document, tokenizer) for document in documents]
    for round_number in range(texts):  # one text of each document, then a second of each, ...
        for document, windows in zip(documents, candidates, strict=True):
            if round_number < len(windows) and texts > 0:
                texts -= 1
                yield document.name, windows[round_number]


def _windows(document: Document, tokenizer: Tokenizer) -> list[str]:
    windows: list[str] = []
    lines: list[str] = []
    count = 0
    for line in document.text.split("\n"):
        lines.append(line)
        count += len(tokenizer.encode(line, add_special_tokens=False).ids) + 1
        if count < HELDOUT_TOKENS + 16:  # a margin: lines joined may encode a little shorter
            continue
        text = _at_most("\n".join(lines).strip("\n"), tokenizer)
        if len(tokenizer.encode(text, add_special_tokens=False).ids) >= HELDOUT_TOKENS:
            windows.append(text)
            lines, count = [], 0
    return windows


def _at_most(text: str, tokenizer: Tokenizer) -> str:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if len(encoding.ids) <= _MAX_TEXT_TOKENS:
        return text
    return text[: encoding.offsets[_MAX_TEXT_TOKENS][0]].rstrip()


def _tokenizer_texts(splits: Mapping[str, Split]) -> Iterator[str]:
    for domain, split in splits.items():
        left = _ARITHMETIC_TOKENIZER_BYTES if domain == "arithmetic" else _TOKENIZER_BYTES
        for document in split.training:
            if left <= 0:
                break
            left -= len(document.text.encode())
            yield document.text


def _encode(documents: tuple[Document, ...], tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    encodings = tokenizer.encode_batch(
        [document.text for document in documents], add_special_tokens=False
    )
    return [np.array([*encoding.ids, END_OF_TEXT_ID]) for encoding in encodings]


def _finish(
    domain: str, raw: Split, cleaned: Split, tokenizer: Tokenizer, heldout: Path
) -> tuple[DomainReport, list[NDArray[np.int64]]]:
    texts = list(heldout_texts(cleaned.heldout, tokenizer))
    with (heldout / f"{domain}.jsonl").open("w", encoding="utf-8") as file:
        for name, text in texts:
            file.write(json.dumps({"document": name, "text": text}, ensure_ascii=False) + "\n")
    shipped = _encode(tuple(Document(name, text) for name, text in texts), tokenizer)
    training = _encode(cleaned.training, tokenizer)
    held = _encode(cleaned.heldout, tokenizer)
    seen = np.unique(np.concatenate([grams(ids) for ids in [*held, *shipped]]))
    pieces = [piece for ids in training for piece in cut_out(ids, seen)]
    size = sum(len(document.text.encode()) for document in cleaned.training)
    report = DomainReport(
        domain=domain,
        documents=len(cleaned.training),
        heldout_documents=len({name for name, _ in texts}),
        heldout_texts=len(texts),
        training_bytes=size,
        training_tokens=sum(map(len, pieces)),
        bytes_per_token=round(size / sum(map(len, training)), 3),
        contamination_raw=contamination(
            _encode(raw.heldout, tokenizer), _encode(raw.training, tokenizer)
        ),
        contamination_cleaned=contamination(shipped, training),
        contamination_final=contamination(shipped, pieces),
    )
    return report, pieces
