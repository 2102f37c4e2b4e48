"""Benchmarks show how far they are in a terminal, and say nothing of it elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from benchmarks.harness import progress
from benchmarks.harness.progress import part_of, say, steps, waiting
from tests.unit.cli.test_progress import Terminal, stderr


def work() -> list[int]:
    with waiting("starting a server") as show:
        show()
    with part_of(2.0, "clients") as ended:
        ended(1.0)
    done = []
    for number in steps([1, 2, 3], "rounds"):
        say(f"| {number} |")
        done.append(number)
    return done


def test_rows_are_printed_whole_beside_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stderr(monkeypatch, Terminal()) as terminal:
        assert work() == [1, 2, 3]
    assert capsys.readouterr().out == "| 1 |\n| 2 |\n| 3 |\n"
    for shown in ("starting a server", "clients:", "rounds:"):
        assert shown in terminal.getvalue()


def test_beside_a_terminal_only_the_rows_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stderr(monkeypatch, io.StringIO()) as log:
        assert work() == [1, 2, 3]
    assert (log.getvalue(), capsys.readouterr().out) == ("", "| 1 |\n| 2 |\n| 3 |\n")
    assert sys.stderr is not log


def test_without_tqdm_only_the_rows_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "tqdm", None)
    with stderr(monkeypatch, Terminal()) as terminal:
        assert work() == [1, 2, 3]
    assert (terminal.getvalue(), capsys.readouterr().out) == ("", "| 1 |\n| 2 |\n| 3 |\n")
