"""One request that may be anything, its answer, and what is wrong with that answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx

__all__ = ["PATIENCE_SECONDS", "Answer", "Asked", "ask", "ask_all", "fault_of", "status_of"]

PATIENCE_SECONDS = 120.0
"""For one answer, on a machine with other work; only a hang takes that long."""

_IN_FLIGHT = 6
_EVENT_ERROR = re.compile(rb'^data: (\{.*"error".*\})\s*$', re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """A request; `about` says what was done to a valid one."""

    path: str
    body: bytes = b""
    about: str = ""
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)

    def __str__(self) -> str:
        body = self.body if len(self.body) <= 400 else self.body[:200] + b"..." + self.body[-100:]
        return f"{self.method} {self.path} {body.decode('latin-1')}  ({self.about})"


@dataclass(frozen=True)
class Answer:
    """What came back; `lost` says why nothing whole did, with status 0 if there was no head."""

    status: int
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: bytes = b""
    lost: str = ""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


async def ask(http: httpx.AsyncClient, asked: Asked) -> Answer:
    """Send one request and read its answer to the end, a stream's too."""
    request = http.build_request(
        asked.method, asked.path, content=asked.body, headers=list(asked.headers)
    )
    status, headers, body = 0, httpx.Headers(), b""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            response = await http.send(request, stream=True)
            status, headers = response.status_code, response.headers
            try:
                async for part in response.aiter_raw():
                    body += part
            finally:
                await response.aclose()
    except (httpx.HTTPError, TimeoutError) as error:
        return Answer(status, headers, body, lost=f"{type(error).__name__}: {error}")
    return Answer(status, headers, body)


async def ask_all(http: httpx.AsyncClient, all_asked: Iterable[Asked]) -> list[str]:
    """Send many requests, a few at a time; return a reproduction of each that went wrong."""
    waiting = iter(all_asked)
    found: list[str] = []

    async def take() -> None:
        for asked in waiting:
            answer = await ask(http, asked)
            if fault := fault_of(answer):
                found.append(f"{asked}\n    -> {fault}")

    async with asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(take())
    return found


def status_of(answer: Answer) -> int:
    """Return the status of an answer; a stream's is that of its error event, if it has one."""
    if answer.status == HTTPStatus.OK and answer.is_stream:
        for event in _EVENT_ERROR.findall(answer.body):
            error = json.loads(event).get("error")
            if isinstance(error, dict):
                code = error.get("code")
                return code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR
    return answer.status


def fault_of(answer: Answer) -> str:
    """Say what is wrong with an answer, or return "".

    A server may say that it does not do something (501), or that it will later (503 and
    Retry-After). Anything else above 499 is a fault, and so is an answer that is not whole.
    """
    said = answer.body[:300].decode("latin-1")
    if answer.lost:
        return f"{answer.status} and then {answer.lost}: {said}"
    status = status_of(answer)
    if status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.NOT_IMPLEMENTED:
        return ""
    if status == HTTPStatus.SERVICE_UNAVAILABLE and answer.headers.get("retry-after", "").isdigit():
        return ""
    return f"{status}: {answer.body[-300:].decode('latin-1') if answer.is_stream else said}"
