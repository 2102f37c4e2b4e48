"""Standard output and error that go away, are full, or were closed from the start: no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from emo_serve import demo
from emo_serve.cli import output
from emo_serve.pools.document import read_pool, write_pool

POOLS = demo.pools_dir()
COMMANDS = {
    "list": f"pools list {POOLS}",
    "show": f"pools show {POOLS}",
    "compare": f"pools compare {POOLS}",
    "help": "--help",
    "help of pools": "pools build --help",
    "help of serve": "serve --help",
    "version": "--version",
}


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which `$EMO` is the command and `$?` of a pipe its own."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"],
        env={
            **os.environ,
            "EMO": f"{sys.executable} -m emo_serve",
            "PYTHONUNBUFFERED": "",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_leaves_ends_the_command_quietly(command: str) -> None:
    done = shell(f"$EMO {command} | (exec 0<&-)")
    assert done.stderr == "" and done.returncode in (0, output.CUT_OFF)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_first_line_is_all_that_is_read(unbuffered: str) -> None:
    done = shell(f"$EMO pools show {POOLS} | head -1", PYTHONUNBUFFERED=unbuffered)
    assert done.stdout.startswith("pool ") and done.stdout.count("\n") == 1
    assert done.stderr == "" and done.returncode in (0, output.CUT_OFF)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_is_one_line(command: str) -> None:
    done = shell(f"$EMO {command} > /dev/full")
    assert done.stderr == "emo-serve: standard output: No space left on device\n"
    assert done.returncode == 1


def test_a_full_disk_is_one_line_without_a_buffer_too() -> None:
    done = shell(f"$EMO pools show {POOLS} > /dev/full", PYTHONUNBUFFERED="1")
    assert done.stderr == "emo-serve: standard output: No space left on device\n"


def test_a_full_standard_error_is_no_reason_for_a_traceback() -> None:
    done = shell("$EMO pools list /no/such/place 2> /dev/full")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed_from_the_start(tmp_path: Path, closed: str) -> None:
    name = sorted(POOLS.glob("*.json"))[0].name
    out = tmp_path / "cut.json"
    done = shell(f"$EMO pools cut {POOLS / name} --experts 4 --out {out} {closed}")
    assert done.returncode == 0 and done.stderr == ""
    assert out.read_text().startswith("{\n") and out.read_text().endswith("}\n")
    done = shell(f"$EMO pools list /no/such/place {closed}")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    pool = read_pool(sorted(POOLS.glob("*.json"))[0])
    write_pool(replace(pool, description="\u6570\u5b66"), path)
    done = shell(f"$EMO pools show {path}", PYTHONIOENCODING="ascii")
    assert r"\u6570\u5b66" in done.stdout and done.returncode == 0


def test_a_server_goes_on_when_its_announcement_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", fail)
    monkeypatch.setattr(output, "drop_output", lambda: dropped.append(True))
    output.announce("ready")
    assert dropped == [True]
