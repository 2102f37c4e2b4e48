"""Ends out of turn: the engine's process is killed, or a start is given up."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.server_process import RawRequest, engines_of, serve, start, wait_for

pytestmark = pytest.mark.vllm


def test_a_dead_engine_ends_streams_and_the_server(
    golden_checkpoint: Path, golden_pools: Path, tmp_path: Path
) -> None:
    flags = ("--pools", str(golden_pools), "--enforce-eager")
    with serve(tmp_path, str(golden_checkpoint), *flags) as server:
        (engine,) = engines_of(server)
        with RawRequest(server, model="math", prompt=["a"] * 100) as request:
            request.read_events(1)
            engine.kill()
            request.read_to_end()
        assert b'"code": 500' in request.received
        wait_for(lambda: server.has_ended, 60)
        assert server.process.returncode == 1


def test_sigterm_gives_up_a_start_and_leaves_no_engine(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    with start(tmp_path, str(golden_checkpoint), "--enforce-eager") as server:
        wait_for(lambda: bool(engines_of(server)), 120)
        (engine,) = engines_of(server)
        server.terminate()
        wait_for(lambda: server.has_ended)
        assert server.process.returncode == 128 + 15
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
