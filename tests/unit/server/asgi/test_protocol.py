"""Connections whose request heads are too long or never end are closed; others are served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from emo_serve.server.asgi.protocol import BoundedHttpProtocol


class Strict(BoundedHttpProtocol):
    max_header_bytes = 2000
    head_seconds = 0.2


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if (await receive())["type"] == "http.request":
        await PlainTextResponse("ok")(scope, receive, send)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", http=Strict)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def talk(port: int, *parts: bytes) -> bytes:
    """Send the parts and return all that is answered until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_requests_are_served_one_after_the_other(port: int) -> None:
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert (await talk(port, request, request, last)).count(b"200 OK") == 3


async def test_what_is_no_http_is_still_a_400(port: int) -> None:
    assert (await talk(port, b"who are you?\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_a_body_is_no_head(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9000\r\n\r\n"
    assert b"200 OK" in await talk(port, head + b"x" * 9000)


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 3000,),
        (b"GET / HTTP/1.1\r\n", *[b"x: y\r\n"] * 500),
        (b"GET /" + b"z" * 3000,),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n",),
    ],
    ids=["one long header", "many headers", "a long path", "a whole head"],
)
async def test_a_head_that_is_too_long_is_refused(port: int, parts: tuple[bytes, ...]) -> None:
    answer = await talk(port, *parts)
    assert answer.startswith(b"HTTP/1.1 431") or answer == b""  # a reset may overtake it
    assert answer == b"" or b"longer than 2000 bytes" in answer


@pytest.mark.parametrize("part", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_connection_without_a_whole_head_is_closed(port: int, part: bytes) -> None:
    assert await talk(port, part) == b""
