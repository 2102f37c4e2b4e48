"""Start-up progress on stderr: one line per stage, and how far long loads are."""

from __future__ import annotations

import logging
import time
from typing import TextIO

from tqdm import tqdm

__all__ = ["StartProgress"]

logger = logging.getLogger(__name__)

_LOG_SECONDS = 5.0
_STAGES = (
    ("Starting to load model", "reading the trunk and allocating expert slots"),
    ("GiB for KV cache", "allocating the KV cache"),
    ("Dynamo bytecode transform", "compiling"),
)
"""Parts of vLLM's log lines (0.32.0), and what the engine does at that point."""


class StartProgress:
    """Report what start-up is doing, until it is `finished`.

    `stream` must still reach the user while this process's own stderr is redirected.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reported: set[str] = set()
        self._bar: tqdm[None] | None = None
        self._is_over = False
        self._copied = (0, 0)
        self._logged_at = time.monotonic()

    def stage(self, text: str) -> None:
        """Report that a stage begins; each is reported once."""
        if not self._is_over and text not in self._reported:
            self._reported.add(text)
            self._stream.write(f"emo-serve: {text}\n")

    def notice(self, line: str) -> None:
        """Report the stage that a line of vLLM's log marks, if it marks one."""
        for part, text in _STAGES:
            if part in line:
                self.stage(text)

    def copied(self, done: int, total: int) -> None:
        """Report how many of a load's experts are in their slots.

        During start-up in a terminal that is a bar, else a log line every few seconds, so short
        loads are not reported.
        """
        if self._is_over or not self._stream.isatty():
            self._log(done, total)
            return
        if self._bar is not None and self._bar.total != total:  # of a load that failed
            self._close_bar()
        if self._bar is None:
            form = "emo-serve: loading experts {percentage:3.0f}% {bar:30} {n}/{total} {elapsed}"
            options = {"total": total, "initial": done, "bar_format": form, "leave": False}
            self._bar = tqdm(file=self._stream, **options)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close_bar()

    def _log(self, done: int, total: int) -> None:
        now, before = time.monotonic(), self._copied
        self._copied = (done, total)
        if total != before[1] or done < before[0]:  # another load
            self._logged_at = now
        elif now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            logger.info("loading experts: %d of %d (%.0f %%)", done, total, 100 * done / total)

    def finished(self) -> None:
        """Report nothing more."""
        self._close_bar()
        self._is_over = True

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
