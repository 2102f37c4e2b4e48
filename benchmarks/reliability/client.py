"""Requests that tell how they ended, and the figures of many."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.reliability.summary import percentiles

__all__ = [
    "COMPLETIONS",
    "Answer",
    "ask",
    "endings",
    "obey",
    "read_event",
    "summary_of",
    "tries_of",
]

COMPLETIONS = "/v1/completions"
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """How one request ended; `status` is None if no answer came.

    `ending` is "finished", "refused" (another status than 200), "error event" (a stream that says
    so), "torn" (a stream that stops without a word) or "no answer".
    """

    status: int | None
    ending: str
    seconds: float
    first_seconds: float | None = None
    events: int = 0
    retry_after: int | None = None
    message: str = ""


async def ask(
    session: aiohttp.ClientSession,
    body: Mapping[str, Any] | bytes,
    path: str = COMPLETIONS,
) -> Answer:
    """POST one request and read its answer to the end; never raises what a server may cause."""
    start = time.monotonic()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with session.post(path, data=data, headers=_JSON) as response:
            if response.content_type == "text/event-stream":
                return await _read_stream(response, start)
            text = await response.text()
            return Answer(
                response.status,
                "finished" if response.status < 300 else "refused",
                time.monotonic() - start,
                retry_after=_seconds(response.headers.get("retry-after")),
                message=text[:300],
            )
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        seconds = time.monotonic() - start
        return Answer(None, "no answer", seconds, message=type(error).__name__)


async def _read_stream(response: aiohttp.ClientResponse, start: float) -> Answer:
    """Read a stream of completions; an event may carry several tokens."""
    first, events, ending, message = None, 0, "torn", ""
    try:
        async for line in response.content:
            event = read_event(line)
            if event is None:
                continue
            if first is None:
                first = time.monotonic() - start
            if event == "[DONE]":
                ending = "finished" if ending == "torn" else ending
            elif "error" in event:
                ending, message = "error event", json.dumps(event["error"])[:300]
            else:
                events += bool(event.get("choices"))
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        message = type(error).__name__
    seconds = time.monotonic() - start
    return Answer(response.status, ending, seconds, first, events, message=message)


def read_event(line: bytes) -> Any:
    """Return what a line of a stream holds: an object, "[DONE]", or None for a line without."""
    if not line.startswith(b"data: "):
        return None
    data = line.removeprefix(b"data: ").strip()
    return "[DONE]" if data == b"[DONE]" else json.loads(data)


def _seconds(header: str | None) -> int | None:
    return int(header) if header is not None and header.isdigit() else None


def endings(answers: Iterable[Answer]) -> dict[str, int]:
    """Count answers by status and ending."""
    counts = Counter(f"{answer.status or '-'} {answer.ending}" for answer in answers)
    return dict(sorted(counts.items()))


def summary_of(answers: Iterable[Answer]) -> dict[str, float]:
    """Return count, median, 99th percentile and maximum of the seconds of answers."""
    return percentiles([answer.seconds for answer in answers])


async def obey(session: aiohttp.ClientSession, body: Mapping[str, Any], tries: int) -> list[Answer]:
    """Ask again after each Retry-After, at most `tries` times in all; return every answer."""
    answers = [await ask(session, body)]
    while len(answers) < tries and answers[-1].status == 503:
        await asyncio.sleep(answers[-1].retry_after or 1)
        answers.append(await ask(session, body))
    return answers


def tries_of(clients: Iterable[list[Answer]]) -> dict[str, Any]:
    """Return how many clients were served at which try, and the Retry-After of first refusals."""
    served: Counter[str] = Counter()
    waits: list[float] = []
    for answers in clients:
        is_served = answers[-1].ending == "finished"
        served[f"try {len(answers)}" if is_served else "never"] += 1
        if answers[0].status == 503:
            waits.append(float(answers[0].retry_after or 0))
    return {"served_at": dict(sorted(served.items())), "retry_after": percentiles(waits)}
