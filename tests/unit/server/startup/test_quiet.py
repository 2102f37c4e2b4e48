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

import pytest

from emo_serve.errors import EngineDead
from emo_serve.server.serve import _explained
from emo_serve.server.startup.engine_output import EngineOutput, find_cause
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.quiet import QuietFilter, is_quiet

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
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "unseen" not in done.stderr and "Triton is not" not in done.stderr


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
    cause = output.cause()
    assert (cause, shown) == ("ValueError: No memory on node 0.", [])
    text = _explained(EngineDead("the engine did not start"), cause)
    assert text.startswith("the engine did not start: ValueError: No memory on node 0. (--log-le")


def test_a_process_that_was_killed_has_no_cause() -> None:
    assert find_cause(FAILED.splitlines()[:2]) is None
    assert "it printed no error" in _explained(EngineDead("the engine did not start"), None)


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
    progress.copied(1, 2)
    progress.finished()
    assert "1/2" in stream.getvalue()
