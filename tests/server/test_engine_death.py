"""The engine's process is killed: nobody waits for ever, and the server ends by itself."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.server.running import RawRequest, serve, wait_for

pytestmark = pytest.mark.vllm


def test_a_dead_engine_ends_streams_and_the_server(
    golden_checkpoint: Path, golden_pools: Path, tmp_path: Path
) -> None:
    flags = ("--pools", str(golden_pools), "--enforce-eager")
    with serve(tmp_path, str(golden_checkpoint), *flags) as server:
        (engine,) = (
            child
            for child in psutil.Process(server.process.pid).children()
            if "EngineCore" in " ".join(child.cmdline())
        )
        with RawRequest(server, model="math", prompt=["a"] * 100) as request:
            request.read_events(1)
            engine.kill()
            request.read_to_end()
        assert b'"code": 500' in request.received
        wait_for(lambda: server.process.poll() is not None, 60)
        assert server.process.returncode == 1
