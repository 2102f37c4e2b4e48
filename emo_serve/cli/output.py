"""Standard output that goes away: a closed pipe, a full disk, descriptors closed from the start.

`emo-serve pools show FILE | head -1` ends quietly, as other commands do. What a command had to
change is changed by then; only its report is lost.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

__all__ = ["CUT_OFF", "announce", "drop_output", "open_standard_streams", "run_to_the_last_byte"]

CUT_OFF = 141
"""Exit status where the reader of standard output left: that of a process ended by SIGPIPE."""


def run_to_the_last_byte(command: Callable[[], int]) -> int:
    """Run a command and flush what it printed, so that a failed write is raised here.

    Raises BrokenPipeError or another OSError of standard output.
    """
    try:
        return command()
    finally:
        sys.stdout.flush()


def open_standard_streams() -> None:
    """Make standard output and error take anything.

    Descriptors that are closed are opened on the null device: the next file opened would get their
    number. Letters that the terminal's encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output(descriptor: int = 1) -> None:
    """Let what is still buffered go nowhere: Python would report it once more as it ends."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), descriptor)


def announce(text: str) -> None:
    """Print for a server, which goes on when its standard output does not."""
    try:
        print(text, flush=True)
    except OSError:
        drop_output()
