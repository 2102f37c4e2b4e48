"""A streamed completion, how long its first token took, and streams beside what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

__all__ = ["beside", "stream_completion"]


async def stream_completion(
    http: httpx.AsyncClient, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[float, httpx.Headers]:
    """Stream one completion to its end; return its seconds to first token and its headers.

    `headers` are added to the client's. Raises httpx.HTTPStatusError for a refusal.
    """
    began, first = time.perf_counter(), None
    document = {"ignore_eos": True, **body, "stream": True}
    sent = http.stream("POST", "/v1/completions", json=document, headers=headers)
    async with sent as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line.startswith("data: {"):
                first = time.perf_counter()
    assert first is not None
    return first - began, response.headers


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
