"""uvicorn's HTTP protocol with bounded headers.

httptools, which uvicorn parses with, takes headers of any size, and a connection that never
completes them is kept for good. Here both end: too many bytes are answered with 431, and a
connection without a complete request head is closed after a while. (uvicorn's other parser, h11,
has a limit of its own.)
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHttpProtocol"]


class BoundedHttpProtocol(HttpToolsProtocol):
    """Close connections whose next request head is too long, or takes too long."""

    max_header_bytes = 64 * 2**10
    head_seconds = 30.0

    _head_bytes: int | None = 0
    """Bytes of the head that is being received; None while there is none."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head, and refuse one that is too long."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        # A head that has ended in this data has set it to None, whatever follows it.
        if self._head_bytes is not None and self._head_bytes > self.max_header_bytes:
            self._end_head()
            self._refuse()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser has stopped at: a head that is too long, or no HTTP."""
        if self._is_too_long():
            self._refuse()
        else:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a head."""
        super().on_message_begin()
        if self._head_bytes is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        """Let the request begin, unless its head is too long."""
        self._end_head()
        if self._is_too_long():
            raise ValueError  # which stops the parser
        super().on_headers_complete()

    def _is_too_long(self) -> bool:
        fields = sum(len(name) + len(value) + 4 for name, value in self.headers)
        return len(self.url) + fields > self.max_header_bytes

    def _begin_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _end_head(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self) -> None:
        text = f"the request's head is longer than {self.max_header_bytes} bytes; send less\n"
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
            b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
            b"content-length: " + str(len(text)).encode() + b"\r\n\r\n" + text.encode()
        )
        self.transport.close()
