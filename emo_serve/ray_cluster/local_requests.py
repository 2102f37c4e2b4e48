"""Requests that one replica passes to others, answered by their own app in their own process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LocalAnswer", "LocalRequest", "ask_app", "is_local"]

_MARK = "emo_serve.local"  # in the scope, which no client can write
_OMITTED = ("content-length", "transfer-encoding", "connection")


@dataclass(frozen=True)
class LocalRequest:
    """One request without its connection; `path` is as routes see it."""

    method: str
    path: str
    query: bytes = b""
    body: bytes = b""


@dataclass(frozen=True)
class LocalAnswer:
    """One answer, complete."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @classmethod
    def of(cls, document: Mapping[str, Any], status: int = HTTPStatus.OK) -> LocalAnswer:
        """Return an answer in JSON."""
        headers = ((b"content-type", b"application/json"),)
        return cls(status, headers, json.dumps(document).encode())

    @property
    def is_success(self) -> bool:
        """Tell whether the request did what it asked."""
        return self.status < HTTPStatus.MULTIPLE_CHOICES

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, as an ASGI app does."""
        length = (b"content-length", str(len(self.body)).encode())
        start: Message = {"type": "http.response.start", "status": self.status}
        await send({**start, "headers": [*self.headers, length]})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


def is_local(scope: Scope) -> bool:
    """Tell whether a connection is one of `ask_app`."""
    return _MARK in scope


async def ask_app(app: ASGIApp, request: LocalRequest, key: str | None = None) -> LocalAnswer:
    """Answer a request by an app of this process; `key` opens its routes."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, _MARK: True}, receive, send)

    transport = httpx.ASGITransport(marked, raise_app_exceptions=False)
    url = httpx.URL("http://replica", path=request.path, query=request.query or None)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(transport=transport, timeout=None, trust_env=False) as client:
        answer = await client.request(request.method, url, content=request.body, headers=headers)
    kept = tuple(pair for pair in answer.headers.raw if pair[0].decode().lower() not in _OMITTED)
    return LocalAnswer(answer.status_code, kept, answer.content)
