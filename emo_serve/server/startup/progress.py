"""The progress of a start on stderr: a line per stage, and a bar while experts are loaded."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

__all__ = ["StartProgress"]

_STAGES = (
    ("Starting to load model", "reading the trunk and allocating expert slots"),
    ("GiB for KV cache", "allocating the KV cache"),
    ("Dynamo bytecode transform", "compiling"),
)
"""Parts of what vLLM (0.32.0) logs, and what the engine is doing then."""


class StartProgress:
    """Tell what a start is doing, until it is `finished`.

    `stream` must be one that is seen while this process's own stderr goes elsewhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: set[str] = set()
        self._bar: tqdm[None] | None = None
        self._is_over = False

    def stage(self, text: str) -> None:
        """Begin a stage; each is told once."""
        if not self._is_over and text not in self._told:
            self._told.add(text)
            self._stream.write(f"emo-serve: {text}\n")

    def notice(self, line: str) -> None:
        """Tell the stage that a line of vLLM's log stands for, if it is known."""
        for part, text in _STAGES:
            if part in line:
                self.stage(text)

    def copied(self, done: int, total: int) -> None:
        """Show how many of a load's experts are in their slots: a bar if this is a terminal."""
        if self._is_over or not self._stream.isatty():
            return
        if self._bar is None:
            form = "emo-serve: loading experts {percentage:3.0f}% {bar:30} {n}/{total} {elapsed}"
            options = {"total": total, "initial": done, "bar_format": form, "leave": False}
            self._bar = tqdm(file=self._stream, **options)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close_bar()

    def finished(self) -> None:
        """Say nothing more."""
        self._close_bar()
        self._is_over = True

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
