"""A server's private directory goes with it, and those of dead servers at the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from emo_serve.server.startup.run_directory import opened_run_directory

VARIABLE = "VLLM_RPC_BASE_PATH"
SERVER = """
import sys
from emo_serve.server.startup.run_directory import opened_run_directory
with opened_run_directory() as directory:
    (directory.path / "shared-memory").write_text(sys.argv[1])
    print(directory.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 characters
        monkeypatch.setenv(VARIABLE, short)
        yield Path(short)


def grow_old(path: Path) -> None:
    os.utime(path, (0, 0))


def test_it_holds_the_sockets_while_the_server_lives(base: Path) -> None:
    with opened_run_directory() as directory:
        assert os.environ[VARIABLE] == str(directory.path)
        assert directory.path.parent == base
        assert directory.path.stat().st_mode & 0o777 == 0o700
        (directory.path / "socket").touch()
    assert os.environ[VARIABLE] == str(base)
    assert list(base.iterdir()) == []


def test_without_a_shell_it_is_removed_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("/bin/sh")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with opened_run_directory() as directory:
        assert directory.path.is_dir()
    assert list(base.iterdir()) == []


def test_a_suspended_shell_does_not_hold_up_the_servers_end(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shells: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def note(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        shells.append(start(*args, **options))
        return shells[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr("emo_serve.server.startup.run_directory._CLEANER_SECONDS", 0.1)
    with opened_run_directory():
        (shell,) = shells
        shell.send_signal(signal.SIGSTOP)
    assert list(base.iterdir()) == []
    assert shell.returncode == -signal.SIGKILL


def test_a_path_too_long_for_sockets_is_not_given_to_vllm(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = base / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv(VARIABLE, str(deep))
    with opened_run_directory():
        assert os.environ[VARIABLE] == str(deep)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_server_leaves_nothing(base: Path, number: signal.Signals) -> None:
    segment = Path(f"/dev/shm/psm_emo_test_{os.getpid()}")
    segment.touch()
    other = Path(f"/dev/shm/other_emo_test_{os.getpid()}")
    other.touch()
    try:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, f"{segment.name}\n"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert server.stdout is not None
        path = Path(server.stdout.readline().decode().strip())
        assert path.is_dir()
        os.killpg(server.pid, number)
        server.communicate()
        deadline = time.monotonic() + 30
        while (path.exists() or segment.exists()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not path.exists() and not segment.exists()
        assert other.exists()
    finally:
        segment.unlink(missing_ok=True)
        other.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_processes_of_a_killed_server_end(base: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "from emo_serve.server.startup.run_directory import opened_run_directory\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "other = subprocess.Popen(sleep)\n"
        "with opened_run_directory() as directory:\n"
        "    print(other.pid, subprocess.Popen(sleep).pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert server.stdout is not None
    other, engine = map(psutil.Process, map(int, server.stdout.readline().split()))
    try:
        server.kill()
        server.wait()
        psutil.wait_procs([engine], timeout=30)
        assert not engine.is_running()
        assert other.is_running()
    finally:
        other.kill()
        server.stdout.close()


def test_the_next_start_removes_what_is_left_of_dead_servers_only(base: Path) -> None:
    segment = Path(f"/dev/shm/psm_emo_left_{os.getpid()}")
    segment.touch()
    outside = base / "outside"
    outside.touch()
    dead, young = base / "emo-serve-run-1-deaddead", base / "emo-serve-run-2-young_12"
    others = [base / "emo-serve-run-1-longer_name", base / "emo-serve-run-3-unlisted"]
    others.append(base / "emo-serve-0.1")
    for path in (dead, young, *others):
        path.mkdir()
    listed = f"{segment.name}\n../../{outside}\n/etc/passwd\n"
    for path in (dead, young, others[0], others[2]):
        (path / "shared-memory").write_text(listed)
    for path in (dead, *others):
        grow_old(path)
    with opened_run_directory() as living:
        grow_old(living.path)
        with opened_run_directory():
            assert living.path.exists()
        assert not dead.exists() and not segment.exists()
        assert young.exists() and outside.exists()
        assert all(path.exists() for path in others)


def test_only_shared_memory_of_vllm_is_noted(base: Path) -> None:
    with opened_run_directory() as directory:
        directory.note_shared_memory(iter([os.getpid(), 2**30]))
        assert (directory.path / "shared-memory").read_text() == ""
