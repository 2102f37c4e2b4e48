"""What all commands share: how one is added, how it reports a refusal, and exit statuses.

A module holds one group of commands and has a function `add_..._commands(add)`; `add` takes a
command's name, the function to run, and a line of help. Tables go to stdout. A refusal is one line
on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from emo_serve.cli.output import drop_output
from emo_serve.cli.rendering.tables import printable
from emo_serve.errors import EmoServeError, Unavailable

__all__ = [
    "FAILED",
    "REFUSED",
    "AddCommand",
    "Command",
    "add_json_flag",
    "adder",
    "print_json",
    "refuse",
    "report_refused",
]

REFUSED = 2
"""Exit status where the user must change something."""
FAILED = 1
"""Exit status where the same command may succeed later."""

Command = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Command, str], argparse.ArgumentParser]


def adder(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> AddCommand:
    """Return the `add` of a parser's commands; what they refuse is reported and is a status."""

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=_reporting(run))
        return command

    return add


def add_json_flag(*commands: argparse.ArgumentParser) -> None:
    """Add --json to commands that list something."""
    for command in commands:
        command.add_argument(
            "--json", action="store_true", help="print JSON for programs, and no tables"
        )


def print_json(document: Any) -> None:
    """Print what --json asks for."""
    print(json.dumps(document, indent=2, allow_nan=False))


def refuse(error: EmoServeError, status: int) -> int:
    """Print an error as one line and return the status."""
    _complain(f"emo-serve: {error}")
    return status


def report_refused(reasons: Iterable[object]) -> int:
    """Print one line per refused pool file, and return REFUSED if there is any, else 0."""
    status = 0
    for reason in reasons:
        _complain(f"emo-serve: refused {reason}")
        status = REFUSED
    return status


def _complain(text: str) -> None:
    """Print one line to stderr; what it cannot take, no one can be told."""
    line = " ".join(text.splitlines())
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        drop_output(2)


def _reporting(run: Command) -> Command:
    def report(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except EmoServeError as error:
            return refuse(error, FAILED if isinstance(error, Unavailable) else REFUSED)

    return report
