"""Progress bars: drawn in a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emo_serve.cli.progress import progress_of, progress_of_bytes, steps_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> Iterator[io.StringIO]:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        yield stream


def show_each() -> None:
    with steps_of("calibrating", 4) as advance:
        advance(2)
    with progress_of("building math") as tell:
        tell(0, 0)
        tell(3, 12)
    with progress_of_bytes("writing") as tell:
        tell(2**20, 2**22)


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with stderr(monkeypatch, Terminal()) as terminal:
        show_each()
    drawn = terminal.getvalue()
    assert all(text in drawn for text in ("calibrating:", "building math:", "writing:"))
    assert drawn.endswith("\r")  # nothing is left of it


def test_beside_a_terminal_nothing_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    with stderr(monkeypatch, io.StringIO()) as log:
        show_each()
    assert log.getvalue() == ""
