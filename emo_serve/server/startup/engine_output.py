"""What the engine's processes print, line by line: shown, dropped, or the cause of a failure.

The output of every process started during start-up goes into a pipe, which a thread of this process
reads for as long as they live. Until the engine runs, lines are kept and not shown: if the start
fails, `cause` finds the reason among them, without 200 lines of stack traces. After that, warnings
and errors are shown as they come, and so is every line that is not a log line of vLLM's, such as
the last output of a process that crashes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import TextIO

from emo_serve.server.startup.quiet import is_harmless

__all__ = ["EngineOutput", "find_cause"]

_LINE = re.compile(r"(?:\([^)]* pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ ")
_CONTINUED = re.compile(r"^(?:\([^)]* pid=\d+\) )?(?:ERROR \d\d-\d\d [\d:]+ \[[^]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit): .")
_NO_CAUSE = re.compile(r"initialization failed|See (?:root cause|stack trace)|Engine core proc")
_DEATH = re.compile(r"(Worker proc \S+) died unexpectedly \(exit code: -(\d+)\)")
_MOST_LINES = 5000
_SHOWN_LEVELS = ("WARNING", "ERROR", "CRITICAL")


class EngineOutput:
    """Read the output of processes started inside `captured`.

    `show` is called with each line to show, `notice` with every line, shown or not.
    """

    def __init__(
        self,
        show: Callable[[str], None] | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._show = show or _to_stderr
        self._notice = notice
        self._lock = threading.Lock()
        self._kept: deque[str] | None = deque(maxlen=_MOST_LINES)
        self._is_ending = False
        read_fd, self._write_fd = os.pipe()
        self._lines: TextIO = os.fdopen(read_fd, errors="replace", newline="\n")
        self._thread = threading.Thread(target=self._read, name="engine-output", daemon=True)
        self._thread.start()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Send the output of processes started inside the block to the pipe.

        Output of this process goes there too, so only one thread may be inside at a time. A stream
        that is closed here stays closed for those processes.
        """
        _start_resource_tracker()
        with _redirected((1, 2), self._write_fd):
            yield

    def started(self) -> None:
        """Show the kept warnings and errors, and from now on each such line as it comes."""
        with self._lock:
            kept, self._kept = self._kept, None
        for line in kept or ():
            if (level := _level(line)) and _matters(level, line):
                self._show(line)

    def ending(self) -> None:
        """Show only warnings and errors from now on: libraries complain while they shut down."""
        self._is_ending = True

    def cause(self, wait_seconds: float = 2.0) -> str | None:
        """Return why the start failed; None if the output does not say.

        The processes must have ended. Closes the pipe, so no more processes can be started in it.
        """
        self.close(wait_seconds)
        with self._lock:
            return find_cause(self._kept or ())

    def close(self, wait_seconds: float = 2.0) -> None:
        """Stop reading once every process has closed its end, or after `wait_seconds`."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1
        self._thread.join(wait_seconds)

    def _read(self) -> None:
        with self._lines:
            for raw in self._lines:
                # Whatever becomes of our own stderr, the pipe must be read on: its writers would
                # block, and once it is closed, fail.
                with suppress(OSError, ValueError):
                    self._take(raw.rstrip("\n"))

    def _take(self, line: str) -> None:
        with self._lock:
            if self._kept is not None:
                self._kept.append(line)
        self._notice(line)
        if self._kept is None:
            level = _level(line)
            if _matters(level, line) if level else not self._is_ending:
                self._show(line)


def find_cause(lines: Iterable[str]) -> str | None:
    """Return the first exception in the output of a failed start, without vLLM's line prefixes.

    vLLM reports it again as its own "initialization failed", which is skipped. A process that a
    signal has ended raises nothing: then vLLM's line of its death is the cause.
    """
    for line in lines:
        text = line[match.end() :] if (match := _CONTINUED.match(line)) else line
        if death := _DEATH.search(text):
            return f"{death[1]} was ended by {_signal_name(int(death[2]))}"
        if _EXCEPTION.match(text) and not _NO_CAUSE.search(text):
            return " ".join(text.split())
    return None


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name}, an instruction that this machine refuses" if name == "SIGILL" else name


def _level(line: str) -> str | None:
    """Return the level of a vLLM log line, None for any other line."""
    match = _LINE.match(line)
    return match[1] if match else None


def _matters(level: str, line: str) -> bool:
    return level in _SHOWN_LEVELS and not is_harmless(line)


def _to_stderr(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


# -- file descriptors --


@contextmanager
def _redirected(fds: Sequence[int], target: int) -> Iterator[None]:
    """Make each of these descriptors that is open a copy of `target` inside the block."""
    saved: list[tuple[int, int]] = []
    for fd in fds:
        with suppress(OSError):  # closed: `emo-serve serve >&-`
            saved.append((fd, os.dup(fd)))
    _flush()
    for fd, _ in saved:
        os.dup2(target, fd)
    try:
        yield
    finally:
        _flush()
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _start_resource_tracker() -> None:
    """Start multiprocessing's helper outside the pipe.

    It inherits our stderr and outlives the engine's processes, so the pipe would stay open; what it
    says of leaks at our exit needs no action by an operator.
    """
    with open(os.devnull, "w") as nothing, _redirected((2,), nothing.fileno()):
        resource_tracker.ensure_running()
