"""Waiting for a process lasts as long as it gets on, and no longer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import progress
from tests.support.progress import QUIET_SECONDS, START_SECONDS, Activity, wait_for


class Clock:
    """Time that passes in sleeps only, a minute at a time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 60.0


class Scripted(Activity):
    """A process that gets on for some looks."""

    def __init__(self, looks: int) -> None:
        super().__init__(0, ())
        self.looks = looks

    def has_moved(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def last_words(self) -> str:
        return "loading"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    replaced = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(progress, "time", replaced)
    return clock


def test_it_waits_as_long_as_something_moves(clock: Clock) -> None:
    wait_for(lambda: clock.now >= 1500, Scripted(looks=100), START_SECONDS)
    assert clock.now == 1500


def test_it_gives_up_when_nothing_moves_and_says_what_was_said_last(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="nothing has moved for 120 s: loading"):
        wait_for(lambda: False, Scripted(looks=5), START_SECONDS)
    assert clock.now == 5 * 60 + QUIET_SECONDS


def test_it_gives_up_in_the_end_even_if_something_moves(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="not within 1800 s: loading"):
        wait_for(lambda: False, Scripted(looks=1000), START_SECONDS)
    with pytest.raises(AssertionError, match=r"not within 600 s$"):
        wait_for(lambda: False)


@contextmanager
def child(program: str, out: Path) -> Iterator[Activity]:
    """Run a program that reads lines from us; yield its activity."""
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=file
        )
    assert process.stdin is not None
    try:
        yield Activity(process.pid, [out])
    finally:
        process.stdin.close()
        process.wait()


def test_output_and_the_work_of_children_are_activity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LEAST_CPU_SECONDS", 0.5)
    works = "import time\nwhile time.process_time() < 3: pass\ntime.sleep(600)"
    program = (
        "import subprocess, sys\n"
        "print('starting', flush=True)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {works!r}])\n"
        "sys.stdin.read()\n"
        "child.kill(), child.wait()\n"
    )
    with child(program, tmp_path / "out") as activity:
        wait_for(lambda: "starting" in activity.last_words())
        assert activity.has_moved()
        for _ in range(3):
            wait_for(activity.has_moved)


def test_a_process_that_waits_is_not_active(tmp_path: Path) -> None:
    with child("import sys; print('ready', flush=True); sys.stdin.read()", tmp_path / "out") as it:
        wait_for(lambda: "ready" in it.last_words())
        assert it.has_moved()
        assert not it.has_moved()
