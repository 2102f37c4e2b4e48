"""The server's life: start the engine, build the server on it, answer requests, drain, stop.

One process answers HTTP and decides about pools; the engine's processes are vLLM's. SIGTERM starts
the drain: readiness turns 503, new work is refused, running and waiting requests finish, and the
process ends with status 0. A second signal cuts the drain short. (Ctrl-C in a terminal reaches the
engine's processes too, and they end their requests at once.)
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext

from emo_serve.errors import EngineDead
from emo_serve.server.build import Server, build_server
from emo_serve.server.shutdown import StopSignals, drain
from emo_serve.server.startup.engine_output import EngineOutput
from emo_serve.server.startup.launch import DefaultModel, Launch, prepare
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.summary import format_summary
from emo_serve.server.vllm_adapter.engine import start_engine
from emo_serve.server.vllm_adapter.openai import bind_socket, run_beside_server
from emo_serve.server.vllm_adapter.request_log import RequestLog

__all__ = ["run"]

logger = logging.getLogger(__name__)

_SHUTDOWN_SECONDS = 10.0  # then the engine's processes are killed


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

    with os.fdopen(os.dup(2), "w", buffering=1) as stderr:
        progress = StartProgress(stderr)
        progress.stage("reading the checkpoint")
        launch = prepare(argv, default_model)
        output = EngineOutput(notice=progress.notice) if is_quiet else None
        status = uvloop.run(_serve(launch, announce, progress, output))
    if output is not None:
        output.close()
        _drop_last_words()
    return status


async def _serve(
    launch: Launch,
    announce: Callable[[str], None],
    progress: StartProgress,
    output: EngineOutput | None,
) -> int:
    signal.signal(signal.SIGTERM, _abandon_start)  # until the drain takes over
    with ExitStack() as stack:
        request_log = None
        if (path := launch.settings.request_log) is not None:
            request_log = stack.enter_context(closing(RequestLog(path)))
        sock = stack.enter_context(closing(bind_socket(launch.args)))
        try:
            progress.stage("starting the engine")
            with nullcontext() if output is None else output.captured():
                engine = start_engine(launch.args)
            stack.callback(engine.shutdown, timeout=_SHUTDOWN_SECONDS)
            signals = StopSignals(asyncio.get_running_loop())
            server = await build_server(launch, engine, request_log, progress)
        except EngineDead as error:
            if output is None:
                raise
            raise EngineDead(_explained(error, output.cause())) from error
        if output is not None:
            # uvicorn logs seven lines for start and stop; requests have their own logger.
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            output.started()
            stack.callback(output.ending)
        progress.finished()
        return await _answer(server, launch, sock, signals, announce)


def _explained(error: EngineDead, cause: str | None) -> str:
    """Return why a start failed, and how to see all that the engine printed."""
    return f"{error}: {cause or 'it printed no error'} (--log-level info shows all its output)"


def _drop_last_words() -> None:
    """Drop what libraries print while Python exits: Triton's bindings list their leaks."""
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
    launch: Launch,
    sock: socket.socket,
    signals: StopSignals,
    announce: Callable[[str], None],
) -> int:
    """Answer requests until a signal or the engine's death; return the exit status."""
    beside = [
        *run_beside_server(server.http, server.llm, launch.args),
        asyncio.create_task(server.coverage.run()),
    ]
    serving = asyncio.create_task(server.http.serve(sockets=[sock]))
    stopping = asyncio.create_task(signals.first.wait())
    try:
        while not server.http.started and not serving.done():
            await asyncio.sleep(0.02)
        if not serving.done():
            announce(format_summary(server.summary))
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await _drain_until_second(server, signals, launch.settings.drain_timeout_seconds)
        server.http.should_exit = True
        await serving
    finally:
        for task in (*beside, stopping):
            task.cancel()
    return 0 if signals.first.is_set() else 1


async def _drain_until_second(server: Server, signals: StopSignals, timeout_seconds: float) -> None:
    admission = server.admission
    logger.info(
        "draining: waiting up to %.0f s for %d running requests; a second signal stops now",
        timeout_seconds,
        admission.num_running,
    )
    draining = asyncio.create_task(drain(admission, server.manager, timeout_seconds))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    if not (draining.done() and draining.result()):
        logger.warning("stopping with %d requests still running", admission.num_running)
    for task in (draining, second):
        task.cancel()
