"""A streamed completion, and how long its first token took."""

from __future__ import annotations

import time
from typing import Any

import httpx

__all__ = ["stream_completion"]


async def stream_completion(
    http: httpx.AsyncClient, body: dict[str, Any]
) -> tuple[float, httpx.Headers]:
    """Stream one completion to its end; return its seconds to first token and its headers.

    Raises httpx.HTTPStatusError for a refusal.
    """
    began, first = time.perf_counter(), None
    document = {"ignore_eos": True, **body, "stream": True}
    async with http.stream("POST", "/v1/completions", json=document) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and line.startswith("data: {"):
                first = time.perf_counter()
    assert first is not None
    return first - began, response.headers
