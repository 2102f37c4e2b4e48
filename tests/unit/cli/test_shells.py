"""Completion as a person meets it: the line of docs/terminal.md in the shell's file, then Tab."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "terminal.md").read_text()
LINES = dict(re.findall(r"^\| (\w+) \| `~/[^|]*\| `(.*)` \|$", PAGE.replace(r"\|", "\0"), re.M))
FILES = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}
BEFORE = {"bash": "", "zsh": "autoload -Uz compinit && compinit -u\n", "fish": ""}
PROMPTS = {
    "bash": "PS1='READY> '\n",
    "zsh": "PS1='READY> '\n",
    "fish": "function fish_prompt; echo -n 'READY> '; end\n",
}
PATIENCE_SECONDS = 60.0


class Typist:
    """A person before a shell's terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._seen = ""

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def sees(self, text: str) -> None:
        """Wait for a text beyond the last one seen."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self._seen:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._terminal], [], [], left)
            assert ready, f"no {text!r} in {self._seen!r}"
            self._seen += os.read(self._terminal, 65536).decode(errors="replace")
        self._seen = self._seen.partition(text)[2]


@contextmanager
def shell(name: str, home: Path) -> Iterator[Typist]:
    """Start an interactive shell as a user has it who followed the page."""
    command = home / "bin" / "emo-serve"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m emo_serve "$@"\n')
    command.chmod(0o755)
    start = home / FILES[name]
    start.parent.mkdir(parents=True, exist_ok=True)
    start.write_text(BEFORE[name] + LINES[name].replace("\0", "|") + "\n" + PROMPTS[name])
    variables = {"HOME": str(home), "TERM": "dumb", "PATH": f"{command.parent}:/usr/bin:/bin"}
    variables["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", name, "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=variables,
        cwd=home,
    )
    os.close(theirs)
    try:
        yield Typist(ours)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


def test_the_page_has_a_line_for_each_shell() -> None:
    assert set(LINES) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_tab_completes_a_command(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    with shell(name, tmp_path) as user:
        user.sees("READY> ")
        user.types("emo-serve pools expo\t")
        user.sees("expo")
        user.sees("rt")
