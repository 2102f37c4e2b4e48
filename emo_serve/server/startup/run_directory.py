"""A private directory for the sockets of one server, which disappears with it, however it ends.

vLLM's sockets lie in the directory that VLLM_RPC_BASE_PATH names, and stay there. Here that is a
directory of the server's own. A server that ends by itself removes it. For one that is killed, a
shell does: it waits for the end of a pipe that only the server holds, and also removes the engine's
shared memory, whose names are listed in the directory. It kills the engine's processes, too, which
are known by their environment: those that are still importing cannot see yet that their parent has
ended (`vllm_plugin.orphans`). What both left, say after a machine lost
power, the next start removes: a directory is in use while its server holds a lock on it. Only a
directory with such a name and such a list is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["RunDirectory", "opened_run_directory"]

_BASE_VARIABLE = "VLLM_RPC_BASE_PATH"
_PREFIX = "emo-serve-run-"
_NAME = re.compile(rf"{_PREFIX}\d+-\w{{8}}")
_SEGMENTS_FILE = "shared-memory"
_SHARED_MEMORY = Path("/dev/shm")
_SEGMENT = re.compile(rf"{_SHARED_MEMORY}/((?:psm_|vllm_dist_)[^/\s]*)$", re.MULTILINE)
_SOCKET_NAME_LENGTH = 1 + 36  # "/" and a UUID
_MAX_SOCKET_PATH = 107  # sun_path in sockaddr_un, without its final zero
_CLEANER_SECONDS = 2.0
_UNLOCKED_SECONDS = 10.0  # a directory this young may not have its lock yet
_CLEANER = f"""trap '' HUP INT TERM
read -r _ || for process in /proc/[0-9]*; do
  grep -qszxF "{_BASE_VARIABLE}=$0" "$process/environ" && kill -9 "${{process#/proc/}}"
done
while read -r name; do rm -f -- "{_SHARED_MEMORY}/$name"; done < "$0/{_SEGMENTS_FILE}"
rm -rf -- "$0"
"""


class RunDirectory:
    """One server's directory; `path` exists while the server lives."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note_shared_memory(self, pids: Iterator[int]) -> None:
        """List the shared memory that vLLM made for these processes, to be removed after a kill."""
        names: set[str] = set()
        for pid in pids:
            with suppress(OSError):  # it has ended
                names.update(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
        (self.path / _SEGMENTS_FILE).write_text("".join(f"{name}\n" for name in sorted(names)))


@contextmanager
def opened_run_directory() -> Iterator[RunDirectory]:
    """Make the directory, and have vLLM put its sockets there; remove those of dead servers."""
    before = os.environ.get(_BASE_VARIABLE)
    base = Path(before or tempfile.gettempdir())
    _remove_dead(base)
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (path / _SEGMENTS_FILE).touch()
    cleaner = _start_cleaner(path)
    if len(os.fsencode(path)) + _SOCKET_NAME_LENGTH <= _MAX_SOCKET_PATH:
        os.environ[_BASE_VARIABLE] = str(path)  # else its sockets stay where vLLM puts them
    try:
        yield RunDirectory(path)
    finally:
        if before is None:
            os.environ.pop(_BASE_VARIABLE, None)
        else:
            os.environ[_BASE_VARIABLE] = before
        if cleaner is None or not _has_cleaned(cleaner):
            _remove(path)
        os.close(lock)


def _has_cleaned(cleaner: subprocess.Popen[bytes]) -> bool:
    """Let the shell do its work; tell whether it did: it may be suspended."""
    try:
        cleaner.communicate(b"\n", timeout=_CLEANER_SECONDS)  # a line: nobody is left to kill
    except subprocess.TimeoutExpired:
        cleaner.kill()
        cleaner.wait()
        return False
    return True


def _start_cleaner(path: Path) -> subprocess.Popen[bytes] | None:
    """Start the shell that waits for this process's end; None if there is no shell."""
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _CLEANER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # signals to the server's process group do not reach it
        )
    except OSError:
        return None


def _remove_dead(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        if not (_NAME.fullmatch(path.name) and (path / _SEGMENTS_FILE).is_file()):
            continue  # somebody else's, or this young
        try:
            if time.time() - path.stat().st_mtime < _UNLOCKED_SECONDS:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # gone, another user's, or no directory
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        except OSError:  # its server lives
            continue
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    """Remove a directory and the shared memory that it lists."""
    with suppress(OSError):
        for name in (path / _SEGMENTS_FILE).read_text().split():
            if _SEGMENT.fullmatch(f"{_SHARED_MEMORY}/{name}"):
                (_SHARED_MEMORY / name).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
