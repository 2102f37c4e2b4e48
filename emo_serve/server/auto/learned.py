"""What `auto` has learned of pools that were built here, kept beside their files for a restart.

By default only what the classifier counted is kept: hashed n-grams (NAME.learned.npz), from which
texts cannot simply be read. With `keeps_examples` the examples themselves are (NAME.examples.jsonl,
in the format of --auto-examples), since an operator who has them may read, change and use them.
Both may say something about the texts, so only their owner can read the files, and they go with the
pool. Neither is a pool file: those end in .json.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from emo_serve.errors import ConfigError
from emo_serve.pools.calibration.examples import Example, read_examples
from emo_serve.server.auto.choice import PoolChooser
from emo_serve.server.auto.classifier import (
    Counts,
    counts_of,
    is_installed,
    read_counts,
    write_counts,
)
from emo_serve.server.auto.example_text import bounded, text_of

__all__ = ["LearnedPools", "learn"]

logger = logging.getLogger(__name__)

_COUNTS = ".learned.npz"
_EXAMPLES = ".examples.jsonl"


class LearnedPools:
    """Keep and read what was learned of pools, in the directory of their files.

    Without a directory nothing is kept. No method raises for files: what cannot be written or read
    is logged, and the pool is served all the same.
    """

    def __init__(self, directory: Path | None, *, keeps_examples: bool) -> None:
        self._directory, self._keeps_examples = directory, keeps_examples

    def keep(self, name: str, texts: Sequence[str]) -> Counts | None:
        """Keep what a pool was built from, in the place of what was kept before.

        Returns what was counted for that; None if nothing was.
        """
        counts: Counts | None = None
        if self._directory is None or not (self._keeps_examples or is_installed()):
            return counts
        if self._keeps_examples:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            kept, other = self._file(name, _EXAMPLES), self._file(name, _COUNTS)
            _write(kept, lambda file: file.write(lines.encode()))
        else:
            kept, other = self._file(name, _COUNTS), self._file(name, _EXAMPLES)
            counts = counts_of(bounded(name, texts))
            _write(kept, partial(write_counts, counts))
        _remove(other)
        return counts

    def forget(self, name: str) -> None:
        """Remove what was kept of a pool."""
        if self._directory is not None:
            for suffix in (_COUNTS, _EXAMPLES):
                _remove(self._file(name, suffix))

    def read(self, names: Iterable[str]) -> dict[str, Sequence[str] | Counts]:
        """Return what was kept of these pools: texts, or their counts."""
        found: dict[str, Sequence[str] | Counts] = {}
        for name in names if self._directory is not None else ():
            kept = self._read(name)
            if kept is not None:
                found[name] = kept
        return found

    def _read(self, name: str) -> Sequence[str] | Counts | None:
        examples, counts = self._file(name, _EXAMPLES), self._file(name, _COUNTS)
        try:
            if examples.exists():
                return list(map(text_of, read_examples([examples])))
            return read_counts(counts) if is_installed() and counts.exists() else None
        except (ConfigError, OSError, ValueError) as error:
            logger.warning("auto does not know pool %s again: %s", name, error)
            return None

    def _file(self, name: str, suffix: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{name}{suffix}"


async def learn(
    chooser: PoolChooser, learned: LearnedPools, name: str, examples: Sequence[Example]
) -> None:
    """Have `auto` learn what a pool was built from, now and after a restart."""
    texts = list(map(text_of, examples))
    counts = await asyncio.to_thread(learned.keep, name, texts)
    chooser.add_examples(name, texts if counts is None else counts)


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that only its owner can read; readers see the old one or the new one."""
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", suffix=".partial", delete=False
        ) as file:
            try:
                write(file)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("%s is not kept for a restart: %s", path.name, error.strerror or error)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error.strerror or error)
