"""One JSON line per engine request, for traces and billing: pool, times, tokens.

It contains no prompts and no answers. Each line is one append, written completely or not at all
unless the disk fills up in the middle of it. So several servers may share the file, and log
rotation may truncate it in place:

    {"at_seconds": 1763.25, "pool": "math", "wait_seconds": 0.0, "service_seconds": 1.5,
     "is_hit": true, "prompt_tokens": 12, "generation_tokens": 64, "outcome": "finished"}

`benchmarks/residency/policies.py --trace FILE` replays such a file. Serving comes before logging: a
full disk costs lines and one warning, never a request.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from emo_serve.errors import ConfigError

__all__ = ["RequestLog", "RequestRecord"]

logger = logging.getLogger(__name__)

_DIGITS = 6  # microseconds


@dataclass(frozen=True)
class RequestRecord:
    """One engine request that has ended.

    `at_seconds` is the Unix time of its arrival. It then waited `wait_seconds` for its pool, and
    the engine worked on it for `service_seconds`. With `is_hit`, the pool needed no load. `outcome`
    is "finished", "aborted" or "failed".
    """

    at_seconds: float
    pool: str
    wait_seconds: float
    service_seconds: float
    is_hit: bool
    prompt_tokens: int
    generation_tokens: int
    outcome: str


class RequestLog:
    """Append records to a file, which is created if necessary; its directory must exist.

    Raises ConfigError for a path that cannot be written; no later error is raised.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"--request-log {path} cannot be written: {error.strerror}") from None
        self._is_line_open = False
        self._lost = 0

    def append(self, record: RequestRecord) -> None:
        """Write one line; a no-op once closed."""
        if self._file is None:
            return
        fields = {
            name: round(value, _DIGITS) if isinstance(value, float) else value
            for name, value in asdict(record).items()
        }
        line = json.dumps(fields).encode() + b"\n"
        data = b"\n" + line if self._is_line_open else line
        try:
            written = os.write(self._file, data)
        except OSError as error:
            self._note_lost(error.strerror or str(error))
            return
        self._is_line_open = written < len(data)
        if self._is_line_open:
            self._note_lost("only part of a line was written")

    def close(self) -> None:
        """Close the file, and log how many lines are missing from it; may be called twice."""
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        if self._lost:
            logger.warning("request log %s: %d lines were lost", self._path, self._lost)

    def _note_lost(self, reason: str) -> None:
        if not self._lost:
            logger.warning(
                "request log %s: a line was lost (%s); further lost lines are counted, and reported"
                " at shutdown",
                self._path,
                reason,
            )
        self._lost += 1
