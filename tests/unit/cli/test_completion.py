"""Completion as shells ask for it: the line in the environment, the answer beside the output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from emo_serve import demo
from emo_serve.cli.connection import KEY_VARIABLES
from tests.unit.cli.test_main import run
from tests.unit.cli.test_pools_of_server import API, Served


def completions(line: str, answers: Path, *, key: str | None = None) -> set[str]:
    """Return what the command answers to Tab at the end of a line; `answers` is a file for it."""
    environ = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
    environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line}
    environ |= {"COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answers)}
    environ |= {"EMO_SERVE_API_KEY": key} if key else {}
    command = [sys.executable, "-m", "emo_serve"]
    subprocess.run(command, env=environ, capture_output=True, check=True, timeout=60)
    return {word.strip() for word in answers.read_text().splitlines() if word.strip()}


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return tmp_path / "answers"


def test_commands_and_flags(answers: Path) -> None:
    assert completions("emo-serve po", answers) == {"pools"}
    assert {"list", "load", "top"} <= completions("emo-serve pools ", answers)
    assert completions("emo-serve serve --port 1 --expert-s", answers) == {"--expert-slots"}


def test_pools_of_the_server_and_of_the_directory_that_the_line_names(
    tmp_path: Path, answers: Path
) -> None:
    directory = tmp_path / "pools"
    directory.mkdir()
    with closing(Served(directory)) as served:
        line = f"emo-serve pools load --server {served.url} "
        assert completions(line, answers, key=API) == {"base", "code", "law", "math"}
        assert completions(line + "m", answers, key=API) == {"math"}
        assert completions(line + "m", answers) == set()  # no key
    line = f"emo-serve pools export --pools {demo.pools_dir()} sp"
    assert completions(line, answers) == {"spanish"}


def test_the_line_for_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, sign in (("bash", "complete "), ("zsh", "compdef "), ("fish", "complete --command")):
        status, out, _ = run(capsys, "completion", shell)
        assert status == 0
        assert sign in out and "emo-serve" in out
        if program := shutil.which(shell):
            subprocess.run([program, "-n"], input=out, text=True, check=True)
