"""What a quiet start lets through, and what it makes of a failed one."""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from emo_serve.server.startup import progress as progress_module
from emo_serve.server.startup.engine_output import EngineOutput, find_cause
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.quiet import QuietFilter, is_quiet, log_to_stderr

FAILED = """\
(Worker pid=7) INFO 11-29 07:41:59 [cpu_model_runner.py:68] Starting to load model /m...
/site/vllm/triton_utils/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is old
(Worker pid=7) ERROR 11-29 07:42:01 [multiproc_executor.py:900] WorkerProc failed to start.
(Worker pid=7) ERROR 11-29 07:42:01 [multiproc_executor.py:900] Traceback (most recent call last):
(Worker pid=7) ERROR 11-29 07:42:01 [multiproc_executor.py:900]   File "/site/vllm/x.py", line 7
(Worker pid=7) ERROR 11-29 07:42:01 [multiproc_executor.py:900]     raise ValueError(
(Worker pid=7) ERROR 11-29 07:42:01 [multiproc_executor.py:900] ValueError: No memory on node 0.
(EngineCore pid=5) ERROR 11-29 07:42:02 [core.py:99] Exception: WorkerProc initialization failed
Process EngineCore:
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["M", "--port", "1"], {}, True),
        (["M", "--log-level", "info"], {}, False),
        (["M", "--log-level=DEBUG"], {}, False),
        (["M", "--logging-config.formatter", "json"], {}, False),
        (["M", "--log_level", "info"], {}, False),
        (["M", "--enable-log-requests"], {}, False),
        (["M", "--served-model-name", "log-level"], {}, True),
        (["M"], {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}, False),
        (["M"], {"VLLM_LOGGING_LEVEL": "INFO"}, False),
        (["M"], {"VLLM_CONFIGURE_LOGGING": "0"}, False),
        (["M"], {"VLLM_LOGGING_CONFIG_PATH": "/x.json"}, False),
        (["M"], {"VLLM_LOGGING_LEVEL": ""}, True),
    ],
)
def test_vllms_own_flags_and_variables_end_the_quiet(
    argv: list[str], environ: dict[str, str], expected: bool
) -> None:
    assert is_quiet(argv, environ) is expected


def test_so_does_vllms_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\n")
    assert is_quiet(["--config", str(file)], {})
    file.write_text("port: 1\nlog_level: INFO\n")
    assert not is_quiet(["--config", str(file)], {})
    assert not is_quiet([f"--config={file}"], {})
    assert is_quiet(["--config", "absent.yaml"], {})  # whose refusal is vLLM's


@pytest.mark.parametrize(
    ("level", "message", "passes"),
    [
        (logging.INFO, "Using max model len 1024", False),
        (logging.WARNING, "Triton is not installed. triton-cpu is expected", False),
        (logging.WARNING, "Sequence group 7 is preempted", True),
        (logging.ERROR, "Engine core died", True),
    ],
)
def test_this_process_logs_warnings_that_may_matter(level: int, message: str, passes: bool) -> None:
    record = logging.LogRecord("vllm.x", level, "x.py", 1, message, None, None)
    assert QuietFilter().filter(record) is passes


def test_the_logging_file_is_one_that_dict_config_takes() -> None:
    text = files("emo_serve.server.startup").joinpath("quiet_logging.json").read_text()
    assert json.loads(text)["filters"]["quiet"]["()"].endswith("quiet.QuietFilter")
    code = (
        "import json, logging, logging.config, sys\n"
        f"logging.config.dictConfig(json.loads({text!r}))\n"
        "logging.getLogger('vllm.x').info('unseen')\n"
        "logging.getLogger('vllm.x').warning('Triton is not installed')\n"
        "logging.getLogger('vllm.x').warning('the cache is small')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "unseen" not in done.stderr and "Triton is not" not in done.stderr
    assert "the cache is small" in done.stderr


def test_our_own_lines_are_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logging.getLogger("emo_serve")
    for name, value in (("handlers", []), ("level", logging.WARNING), ("propagate", True)):
        monkeypatch.setattr(ours, name, value)
    for _ in range(2):
        log_to_stderr()
    assert len(ours.handlers) == 1 and ours.isEnabledFor(logging.INFO) and not ours.propagate


# -- the engine's output --


def print_in_child(text: str) -> None:
    subprocess.run([sys.executable, "-c", f"print({text!r}, flush=True)"], check=True)


def test_output_of_a_start_is_kept_back_and_what_matters_is_shown_when_it_has_started() -> None:
    shown: list[str] = []
    noticed: queue.Queue[str] = queue.Queue()
    output = EngineOutput(shown.append, noticed.put)
    warning = "(Worker pid=7) WARNING 11-29 07:42:01 [x.py:1] the cache is small"
    with output.captured():
        print_in_child(f"raw\n{warning}\n(Worker pid=7) INFO 11-29 07:42:01 [x.py:1] fine")
        writer = os.dup(1)  # as a process that lives on has it
    os.write(writer, b"(W pid=7) WARNING 11-29 07:42:01 [x.py:1] Enforce eager set, and so on\n")
    for _ in range(4):
        noticed.get(timeout=60)
    assert shown == []
    output.started()
    assert shown == [warning]
    os.write(writer, b"terminate called after throwing\n(W pid=7) INFO 11-29 07:42:01 [x:1] no\n")
    noticed.get(timeout=60)
    noticed.get(timeout=60)
    output.ending()
    os.write(writer, b"nanobind: leaked 4 instances!\n")
    os.close(writer)
    output.close()
    assert shown == [warning, "terminate called after throwing"]


def test_output_outside_is_this_processs_own(capfd: pytest.CaptureFixture[str]) -> None:
    output = EngineOutput(lambda line: None)
    with output.captured():
        print_in_child("inside")
    print_in_child("outside")
    output.close()
    assert capfd.readouterr().out == "outside\n"


def test_the_cause_of_a_failed_start_is_the_first_exception_and_nothing_was_shown() -> None:
    shown: list[str] = []
    output = EngineOutput(shown.append)
    with output.captured():
        print_in_child(FAILED)
    assert (output.cause(), shown) == ("ValueError: No memory on node 0.", [])


def test_a_process_that_was_killed_has_no_cause() -> None:
    assert find_cause(FAILED.splitlines()[:2]) is None


def test_a_process_that_a_signal_ended_is_the_cause() -> None:
    died = "(E pid=7) ERROR 11-29 09:16:33 [x.py:3] Worker proc VllmWorker-0 died unexpectedly"
    lines = [f"{died} (exit code: -4), shutting down", "RuntimeError: cancelled"]
    words = "Worker proc VllmWorker-0 was ended by SIGILL, an instruction that this machine refuses"
    assert find_cause(lines) == words
    assert (
        find_cause([f"{died} (exit code: -9)"]) == "Worker proc VllmWorker-0 was ended by SIGKILL"
    )
    assert find_cause([f"{died} (exit code: 1)", "ValueError: this"]) == "ValueError: this"


def test_a_stderr_that_fails_does_not_stop_the_reading() -> None:
    def fail(line: str) -> None:
        raise BrokenPipeError

    noticed: queue.Queue[str] = queue.Queue()
    output = EngineOutput(fail, noticed.put)
    output.started()
    with output.captured():
        for text in ("one", "two"):
            print_in_child(text)
    output.close()
    assert [noticed.get(timeout=60), noticed.get(timeout=60)] == ["one", "two"]


def test_streams_may_be_closed() -> None:
    code = (
        "import os, subprocess, sys\n"
        "from emo_serve.server.startup.engine_output import EngineOutput\n"
        "lines = []\n"
        "output = EngineOutput(lines.append)\n"
        "output.started()\n"
        "with output.captured():\n"
        "    subprocess.run([sys.executable, '-c', 'import os; os.write(2, b\"x\\\\n\")'])\n"
        "output.close()\n"
        "os._exit(0 if lines == ['x'] else 1)\n"
    )
    command = f'exec {sys.executable} -c "$CODE" >&-'
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "CODE": code})
    assert done.returncode == 0


# -- progress --


def test_each_stage_is_reported_once_and_none_after_the_end() -> None:
    stream = io.StringIO()
    progress = StartProgress(stream)
    for line in FAILED.splitlines() * 2:
        progress.notice(line)
    progress.stage("warming up")
    progress.copied(1, 4)  # no terminal, no bar
    progress.finished()
    progress.stage("late")
    assert stream.getvalue().splitlines() == [
        "emo-serve: reading the trunk and allocating expert slots",
        "emo-serve: warming up",
    ]


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = StartProgress(stream)
    progress.copied(1, 4)
    assert "loading experts  25%" in stream.getvalue()
    progress.copied(4, 4)
    progress.copied(1, 2)  # of a load that fails
    progress.copied(1, 3)
    progress.finished()
    assert "1/2" in stream.getvalue() and "1/3" in stream.getvalue()


def test_without_a_terminal_long_loads_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = StartProgress(io.StringIO())
    with caplog.at_level(logging.INFO, logger=progress_module.__name__):
        for now in (1.0, 6.0, 7.0):
            progress.copied(int(now), 12)
        progress.finished()
        now = 12.0
        progress.copied(12, 12)
    assert [record.getMessage() for record in caplog.records] == [
        "loading experts: 6 of 12 (50 %)",
        "loading experts: 12 of 12 (100 %)",
    ]
