"""A streamed completion, when its tokens came, and streams beside what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

__all__ = ["beside", "stream_completion", "token_times"]


async def stream_completion(
    http: httpx.AsyncClient, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[float, httpx.Headers]:
    """Stream one completion to its end; return its seconds to first token and its headers.

    `headers` are added to the client's. Raises httpx.HTTPStatusError for a refusal.
    """
    began, first = time.perf_counter(), None
    async with _sent(http, body, headers) as response:
        async for at in _times(response):
            first = first or at
    assert first is not None
    return first - began, response.headers


async def token_times(http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[float]:
    """Stream one completion to its end; yield when each piece came, in perf_counter's seconds.

    Raises httpx.HTTPStatusError for a refusal.
    """
    async with _sent(http, body) as response:
        async for at in _times(response):
            yield at


@asynccontextmanager
async def _sent(
    http: httpx.AsyncClient, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> AsyncIterator[httpx.Response]:
    document = {"ignore_eos": True, **body, "stream": True}
    sent = http.stream("POST", "/v1/completions", json=document, headers=headers)
    async with sent as response:
        response.raise_for_status()
        yield response


async def _times(response: httpx.Response) -> AsyncIterator[float]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield time.perf_counter()


@asynccontextmanager
async def beside(
    endless: Iterable[Coroutine[Any, Any, None]],
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run coroutines that do not end by themselves until the block ends; yield their tasks."""
    tasks = [asyncio.create_task(each) for each in endless]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
