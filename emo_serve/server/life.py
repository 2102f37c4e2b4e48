"""One server from its engine's start to its end, without signals and without a socket.

Whoever runs it owns those: `serve` answers on a port until a signal comes, and a replica of a
cluster is asked by the cluster's proxies.

    life = ServerLife(launch, progress, directory)
    life.start()                      # the engine; blocks for as long as that takes
    server = await life.build()       # the app around it, its pools loaded
    ...                               # answer requests by server.app
    await life.drain(30.0)            # or life.cut(), for what is still running
    life.stop()                       # the engine's processes; may be called at any time
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

from emo_serve.errors import Draining, EngineDead
from emo_serve.server.build import Server, build_server
from emo_serve.server.health import child_processes
from emo_serve.server.layers import Around, unchanged
from emo_serve.server.shutdown import drain
from emo_serve.server.startup.engine_output import EngineOutput
from emo_serve.server.startup.launch import Launch
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.run_directory import RunDirectory
from emo_serve.server.vllm_adapter.engine import start_engine, stop_engine
from emo_serve.server.vllm_adapter.request_log import RequestLog

__all__ = ["ServerLife", "explained"]

_CUT_SECONDS = 1.0  # for the last events of requests that are cut


class ServerLife:
    """Start an engine, build the server on it, and end both.

    With `output`, the engine's output is captured while it starts. Call `start` with the event loop
    running that will serve requests.
    """

    def __init__(
        self,
        launch: Launch,
        progress: StartProgress,
        directory: RunDirectory,
        request_log: RequestLog | None = None,
        output: EngineOutput | None = None,
    ) -> None:
        self._launch, self._progress, self._directory = launch, progress, directory
        self._request_log, self._output = request_log, output
        self._engine: Any = None
        self._server: Server | None = None

    def start(self) -> None:
        """Start the engine; raises EngineDead, and ConfigError for flags that vLLM refuses."""
        self._progress.stage("starting the engine")
        plan, output = self._launch.plan, self._output
        try:
            with nullcontext() if output is None else output.captured():
                self._engine = start_engine(self._launch.args, on_every_core=plan.has_long_steps)
        except EngineDead as error:
            raise explained(error, output) from error
        self._directory.note_shared_memory(process.pid for process in child_processes())

    async def build(self, around: Around = unchanged) -> Server:
        """Build the server and load the pools of the start; raises as `build_server` does."""
        launch, log = self._launch, self._request_log
        try:
            self._server = await build_server(launch, self._engine, log, self._progress, around)
        except EngineDead as error:
            raise explained(error, self._output) from error
        return self._server

    def run_beside(self) -> list[asyncio.Task[None]]:
        """Start what must run while requests are served; the caller cancels it at the end."""
        assert self._server is not None
        return [
            asyncio.create_task(self._server.coverage.run()),
            asyncio.create_task(self._server.health.run()),
        ]

    async def drain(self, timeout_seconds: float) -> bool:
        """Refuse new work and wait for what is running; False if it took too long."""
        assert self._server is not None
        return await drain(self._server.admission, self._server.manager, timeout_seconds)

    async def cut(self) -> None:
        """End the requests that are still running, each with an error its client can read."""
        assert self._server is not None
        self._server.llm.cut(
            Draining("the server stopped before this request was finished; send it again")
        )
        await self._server.admission.idle(_CUT_SECONDS)

    @property
    def has_died(self) -> bool:
        """Tell whether the engine has died; whoever runs the server starts another one."""
        return self._engine is not None and bool(self._engine.errored)

    def stop(self) -> None:
        """End the engine's processes, if there are any."""
        engine, self._engine = self._engine, None
        if engine is not None:
            stop_engine(engine)


def explained(error: EngineDead, output: EngineOutput | None) -> EngineDead:
    """Return the error with its cause, if the output says it, and how to see more."""
    if output is None:
        return EngineDead(
            f"{error}; the first ERROR above says why (on a CPU often memory: see"
            " --kv-cache-memory-bytes)"
        )
    cause = output.cause()
    reason = f"{error}: {cause}" if cause else f"{error}, and printed no error"
    return EngineDead(f"{reason} (--log-level info shows all its output)")
