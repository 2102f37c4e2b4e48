"""Starts that cannot work: one line on stderr and status 2, before any engine is started."""

from __future__ import annotations

import gc
import socket
import warnings
from pathlib import Path

import pytest

from emo_serve.cli import main as cli
from emo_serve.config import GIB
from emo_serve.server import life
from emo_serve.server.startup import launch
from emo_serve.server.startup.machine_memory import MemoryLimit

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(life, "start_engine", fail)
    monkeypatch.setattr("emo_serve.server.startup.quiet.log_to_stderr", lambda: None)
    # whatever else runs on this machine
    monkeypatch.setattr(launch, "read_limits", lambda nodes: (MemoryLimit("test", 9 * GIB),))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the last line on stderr; vLLM may have logged before it."""
    assert cli.main(["serve", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--enable-lora"],
            "--enable-lora is True, which emo-serve does not support yet: a request",
        ),
        (["--api-server-count", "2"], "--api-server-count is 2"),
        (["--data-parallel-size", "2"], "--data-parallel-size is 2"),
        (["--enable-expert-parallel"], "--enable-expert-parallel is True"),
        (["--pipeline-parallel-size", "4"], "--pipeline-parallel-size is 4, and the model has 3"),
        (["--quantization", "fp8"], "--quantization is 'fp8'"),
        (
            ["--speculative-config", '{"method": "mtp"}'],
            "--speculative-config: the method is 'mtp'",
        ),
        (["--runner", "pooling"], "--runner is 'pooling'"),
        (["--additional-config", '{"emo_serve": {}}'], "--additional-config: the key"),
        (["--load-format", "dummy"], "--load-format is 'dummy'"),
        (["--default-pool", "nope"], "--default-pool: there is no pool 'nope'"),
        (["--expert-slots", "40"], "--expert-slots is 40; a layer has at most 32"),
        (["--expert-memory", "1KiB"], "--expert-memory 1024 bytes is too small: one slot"),
        (["--max-model-len", "100000"], "vLLM refuses these flags:"),
    ],
)
def test_flags_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    golden_checkpoint: Path,
    golden_pools: Path,
    flags: list[str],
    message: str,
) -> None:
    line = refusal(capsys, str(golden_checkpoint), "--pools", str(golden_pools), *flags)
    assert line.startswith(f"emo-serve: {message}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/model", "MODEL '/no/such/model' is not a directory"),
        ("nobody/no-such-model", "MODEL 'nobody/no-such-model' is neither a directory nor"),
        ("..", "config.json does not exist"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], model: str, message: str
) -> None:
    assert message in refusal(capsys, model)


def test_a_machine_that_is_too_small_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    golden_checkpoint: Path,
    golden_pools: Path,
) -> None:
    limits = (MemoryLimit("cgroup /pod", GIB), MemoryLimit("test", 9 * GIB))
    monkeypatch.setattr(launch, "read_limits", lambda nodes: limits)
    line = refusal(capsys, str(golden_checkpoint), "--pools", str(golden_pools))
    assert line.startswith("emo-serve: the memory is too small: trunk 0.0005 GiB + slab 0.00")
    assert "GiB, and 1.00 GiB is free (cgroup /pod); lower --max-model-len, give smaller" in line


def test_a_taken_port_is_refused(
    capsys: pytest.CaptureFixture[str], golden_checkpoint: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refusal(capsys, str(golden_checkpoint), "--host", "127.0.0.1", "--port", port)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # vLLM leaves the socket it could not bind to the collector
    assert line == f"emo-serve: cannot listen on 127.0.0.1:{port}: Address already in use"
