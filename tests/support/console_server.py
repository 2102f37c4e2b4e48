"""The app of `built_app` behind a real port, for browsers: uvicorn on a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import uvicorn
from fastapi import APIRouter

from tests.support.built_app import BuiltApp
from tests.support.pool_services import ServiceUnderTest

_T = TypeVar("_T")


class ConsoleServer:
    """A server that runs; `site` is its app, to be touched in `call` only."""

    def __init__(self, site: BuiltApp, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.site, self._loop = site, loop
        self.url = f"http://127.0.0.1:{port}"

    def call(self, function: Callable[[], _T]) -> _T:
        """Return what a function returns that is called on the server's loop."""

        async def called() -> _T:
            return function()

        return self.wait(called)

    def wait(self, function: Callable[[], Awaitable[_T]]) -> _T:
        """Return what a coroutine returns that runs on the server's loop."""

        async def awaited() -> _T:
            return await function()

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(30)


@contextmanager
def console_server(
    checkpoint: Path,
    make_service: Callable[[], ServiceUnderTest],
    keys: Sequence[Sequence[str]] = ((), ()),
) -> Iterator[ConsoleServer]:
    """Serve until the block ends."""
    sock = socket.create_server(("127.0.0.1", 0))
    started: list[ConsoleServer] = []
    is_started, servers = threading.Event(), []

    async def serve() -> None:
        site = await BuiltApp.of(checkpoint, service=make_service(), keys=keys)
        site.app.include_router(_ready())
        http = uvicorn.Server(uvicorn.Config(site.app, log_level="warning", lifespan="off"))
        servers.append((http, site))
        loop = asyncio.get_running_loop()
        started.append(ConsoleServer(site, loop, sock.getsockname()[1]))
        is_started.set()
        await http.serve(sockets=[sock])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert is_started.wait(120)
    try:
        yield started[0]
    finally:
        http, site = servers[0]
        site.is_ending = True
        http.should_exit = True
        thread.join(30)


def _ready() -> APIRouter:
    router = APIRouter()

    @router.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return router
