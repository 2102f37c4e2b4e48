"""The server's life: start the engine, build the server on it, answer requests, drain, stop.

One process answers HTTP and decides about pools; the engine's processes are vLLM's, and end when it
does, however it ends. SIGTERM starts the drain: readiness turns 503, new work is refused, running
and waiting requests finish, and the process ends with status 0, or with 3 if it cut some. SIGHUP
does the same unless it is ignored (nohup). A second signal cuts the drain short. (Ctrl-C in a
terminal reaches the engine's processes too, and they end their requests at once.)
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

# First, as in `vllm serve`: if prometheus_client were imported long before vLLM's protocol, a cache
# of typing's would give some of vLLM's models other types, and so other names in /openapi.json.
from emo_serve.server.vllm_adapter.openai import (
    bind_socket,
    create_http_server,
    run_beside_server,
)

# isort: split
from emo_serve.server.build import Server
from emo_serve.server.life import ServerLife
from emo_serve.server.shutdown import StopSignals, stop_signals
from emo_serve.server.startup.engine_output import EngineOutput
from emo_serve.server.startup.launch import DefaultModel, Launch, prepare
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.run_directory import RunDirectory, opened_run_directory
from emo_serve.server.startup.summary import format_summary
from emo_serve.server.vllm_adapter.request_log import RequestLog

__all__ = ["CUT_STATUS", "run"]

logger = logging.getLogger(__name__)

CUT_STATUS = 3
"""The exit status of a server that ended requests before they were finished."""


def run(
    argv: Sequence[str],
    announce: Callable[[str], None],
    default_model: DefaultModel,
    *,
    is_quiet: bool,
) -> int:
    """Serve until a signal; return the exit status.

    `announce` is called with the start-up summary. With `is_quiet`, only warnings and errors of the
    engine's output are shown. Raises ConfigError for flags that cannot work, before anything heavy
    is started, and EngineDead if the engine does not start.
    """
    import uvloop

    with ExitStack() as stack:
        stderr = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        progress = StartProgress(stderr)
        stack.callback(progress.finished)
        launch = prepare(argv, default_model, progress)
        output = None
        if is_quiet:
            output = EngineOutput(notice=progress.notice)
            stack.callback(output.close)
            atexit.register(_drop_last_words)
        request_log = None
        if (path := launch.settings.request_log) is not None:
            # Closed after the event loop: requests that it cancels at its end have a line, too.
            request_log = stack.enter_context(closing(RequestLog(path)))
        directory = stack.enter_context(opened_run_directory())
        return uvloop.run(_serve(launch, announce, request_log, progress, output, directory))


async def _serve(
    launch: Launch,
    announce: Callable[[str], None],
    request_log: RequestLog | None,
    progress: StartProgress,
    output: EngineOutput | None,
    directory: RunDirectory,
) -> int:
    for number in stop_signals():  # until the drain takes over
        if number != signal.SIGINT:
            signal.signal(number, _abandon_start)
    with ExitStack() as stack:
        sock = stack.enter_context(closing(bind_socket(launch.args)))
        if launch.args.uds:
            stack.callback(Path(launch.args.uds).unlink, missing_ok=True)
        life = ServerLife(launch, progress, directory, request_log, output)
        stack.callback(life.stop)
        life.start()
        signals = StopSignals(asyncio.get_running_loop())
        server = await life.build()
        if output is not None:
            output.started()
            stack.callback(output.ending)
            if launch.args.uvicorn_log_level == "info":
                # uvicorn logs seven lines for start and stop; requests have their own logger.
                logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        progress.finished()
        return await _answer(server, life, launch, sock, signals, announce)


def _drop_last_words() -> None:
    """Drop what libraries print while Python exits: Triton's bindings list their leaks."""
    if sys.stderr is not None:
        sys.stderr.flush()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)


def _abandon_start(number: int, _: object) -> None:
    """Exit at once with the engine: an exception raised here would be lost in its start-up."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


async def _answer(
    server: Server,
    life: ServerLife,
    launch: Launch,
    sock: socket.socket,
    signals: StopSignals,
    announce: Callable[[str], None],
) -> int:
    """Answer requests until a signal or the engine's death; return the exit status."""
    http = create_http_server(server.app, launch.args)
    beside = [*run_beside_server(http, server.llm, launch.args), *life.run_beside()]
    serving = asyncio.create_task(http.serve(sockets=[sock]))
    stopping = asyncio.create_task(signals.first.wait())
    is_drained = True
    try:
        while not http.started and not serving.done():
            await asyncio.sleep(0.02)
        if not serving.done():
            announce(format_summary(server.summary))
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            timeout_seconds = launch.settings.drain_timeout_seconds
            is_drained = await _drain_until_second(server, life, signals, timeout_seconds)
        http.should_exit = True
        await serving
    finally:
        for task in (*beside, stopping):
            task.cancel()
    if not signals.first.is_set():
        return 1
    return 0 if is_drained else CUT_STATUS


async def _drain_until_second(
    server: Server, life: ServerLife, signals: StopSignals, timeout_seconds: float
) -> bool:
    """Finish the running requests; cut them at the timeout or second signal, and return False."""
    admission = server.admission
    logger.info(
        "draining: waiting up to %.0f s for %d running requests; a second signal stops now",
        timeout_seconds,
        admission.num_running,
    )
    draining = asyncio.create_task(life.drain(timeout_seconds))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    is_drained = draining.done() and draining.result()
    for task in (draining, second):
        task.cancel()
    if not is_drained:
        logger.warning("stopping with %d requests still running", admission.num_running)
        await life.cut()
    return is_drained
