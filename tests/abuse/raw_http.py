"""HTTP that no client library would send: heads, lengths and chunks that are wrong or never end."""

from __future__ import annotations

import asyncio
import json

__all__ = ["PARTS_OF_REQUESTS", "READ_AT_MOST", "WHOLE_REQUESTS", "exchange", "headed", "post"]

READ_AT_MOST = 2**20
"""Bytes of an answer that are kept."""


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    """Return the bytes of one POST; the server closes the connection after its answer."""
    return (
        headed(f"POST {path}".encode(), b"Content-Length: %d" % len(body), *headers)
        + b"\r\n"
        + body
    )


def headed(request: bytes, *headers: bytes) -> bytes:
    """Return a head without the empty line that ends it."""
    lines = (b"Host: x", b"Content-Type: application/json", b"Connection: close", *headers)
    return request + b" HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines)


_TEXT = json.dumps({"model": "python", "prompt": "def ", "max_tokens": 2}).encode()
_COMPLETIONS = "/v1/completions"
_CHUNKED = headed(b"POST /v1/completions", b"Transfer-Encoding: chunked") + b"\r\n"


def _headed_post(*headers: bytes) -> bytes:
    return post(_COMPLETIONS, _TEXT, *headers)


WHOLE_REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "8 kB of headers": (_headed_post(b"X-A: " + b"a" * 8000), {200}),
    "100 kB of headers": (_headed_post(b"X-A: " + b"a" * 100_000), {431}),
    "1 MB of headers": (_headed_post(b"X-A: " + b"a" * 1_000_000), {431}),
    "10 MB of headers": (_headed_post(b"X-A: " + b"a" * 10_000_000), {431, 0}),
    "500 headers": (_headed_post(*(b"X-%d: a" % i for i in range(500))), {200}),
    "20,000 headers": (_headed_post(*(b"X-%d: a" % i for i in range(20_000))), {431}),
    "a path of 60,000 letters": (headed(b"GET /v1/pools/" + b"a" * 60_000) + b"\r\n", {404}),
    "a path of 100,000 letters": (headed(b"GET /v1/pools/" + b"a" * 100_000) + b"\r\n", {431}),
    "a union of 8,000 pools": (
        headed(b"GET /v1/pools/" + b"+".join([b"python", b"math"] * 4000)) + b"\r\n",
        {200},
    ),
    "a zero in x-emo-pool": (_headed_post(b"x-emo-pool: py\x00thon"), {400}),
    "no UTF-8 in x-emo-pool": (_headed_post(b"x-emo-pool: \xff\xe9"), {400}),
    "x-emo-pool twice": (_headed_post(b"x-emo-pool: python", b"x-emo-pool: math"), {400}),
    "40 kB of x-emo-pool": (_headed_post(b"x-emo-pool: " + b"a+" * 20_000), {400, 404}),
    "tabs around x-emo-pool": (_headed_post(b"x-emo-pool:\tpython\t"), {200}),
    "an empty x-emo-pool": (_headed_post(b"x-emo-pool: "), {400}),
    "a bad x-emo-coverage": (_headed_post(b"x-emo-coverage: \xff"), {400}),
    "chunks of no length": (_CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n", {400}),
    "chunks of a negative length": (_CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk longer than it says": (_CHUNKED + b"5\r\nabcdefgh\r\n0\r\n\r\n", {400}),
    "chunked and with a length": (_headed_post(b"Transfer-Encoding: chunked"), {400}),
    "two lengths": (_headed_post(b"Content-Length: 3"), {400}),
    "a negative length": (headed(b"POST /tokenize", b"Content-Length: -1") + b"\r\n{}", {400}),
    "a length of 20 digits": (
        headed(b"POST /tokenize", b"Content-Length: 99999999999999999999") + b"\r\n{}",
        {400},
    ),
    "TLS": (b"\x16\x03\x01\x02\x00\x01garbage\r\n\r\n", {400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", {200, 400}),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", {200}),
    "lines without carriage returns": (
        b"GET /health HTTP/1.1\nHost: x\nConnection: close\n\n",
        {200, 400},
    ),
    "a folded header": (headed(b"GET /health", b"A: b\r\n c") + b"\r\n", {200, 400}),
    "a whole URL": (headed(b"GET http://x/health") + b"\r\n", {200, 400, 404}),
    "a zero in a pool's name": (headed(b"GET /v1/pools/%00") + b"\r\n", {400, 404}),
    "bad escapes in a name": (headed(b"GET /v1/pools/%ff%fe%zz") + b"\r\n", {400, 404}),
    "a byte of no UTF-8 in a path": (headed(b"GET /v1/pools/\xff") + b"\r\n", {400, 404}),
    "an unknown Expect": (_headed_post(b"Expect: foo"), {200, 417}),
    "a websocket": (
        b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n",
        {403, 404, 405},
    ),
    "an unknown method": (headed(b"FOO /v1/pools") + b"\r\n", {400, 405}),
}
"""Requests that end, by what is odd about them, and the statuses that may answer them."""

PARTS_OF_REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", {0}),
    "a head that does not end": (headed(b"POST /v1/completions", b"Content-Length: 9"), {0}),
    "a body that does not end": (
        headed(b"POST /v1/completions", b"Content-Length: 100") + b'\r\n{"m',
        {408},
    ),
    "a chunk that does not end": (_CHUNKED + b'ff\r\n{"m', {408}),
    "a pool that does not end": (
        headed(b"POST /v1/pools", b"Content-Length: 100") + b'\r\n{"n',
        {408},
    ),
}
"""Requests whose rest never comes; 0 stands for a connection that is closed without an answer."""


async def exchange(port: int, data: bytes, patience_seconds: float) -> tuple[int, bytes]:
    """Send bytes, and read until the server closes; return the status and what came.

    The status is 0 if nothing came, and -1 if the server kept the connection beyond the patience.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    came = b""
    try:
        async with asyncio.timeout(patience_seconds):
            writer.write(data)
            await writer.drain()
            while part := await reader.read(65536):
                came = (came + part)[:READ_AT_MOST]
    except ConnectionError:
        pass  # the server did not read all; what it said before is kept
    except TimeoutError:
        return -1, came
    finally:
        writer.close()
    words = came.split(b" ", 2)
    return (int(words[1]) if came.startswith(b"HTTP/") else 0), came
