"""What the server says about itself, asked by an observer: requests, leases, pools, metrics."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from typing import Any

import aiohttp

__all__ = ["metric", "pools", "refusals", "residency", "sum_of_metric", "until_idle"]


async def pools(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Return GET /v1/pools."""
    async with session.get("/v1/pools") as response:
        response.raise_for_status()
        found: dict[str, Any] = await response.json()
        return found


async def residency(session: aiohttp.ClientSession) -> dict[str, Any]:
    """Return requests, slots and the number of pools in each state."""
    now = await pools(session)
    return {
        "running_requests": now["running_requests"],
        "waiting_requests": now["waiting_requests"],
        "slots": {key: now["slots"][key] for key in ("total", "used", "free", "leased")},
        "states": dict(Counter(card["state"] for card in now["data"])),
        "metric_running": await metric(session, "emo_serve_running_requests"),
        "metric_leased": await metric(session, "emo_serve_slots_leased"),
        "engine_running": await metric(session, "vllm:num_requests_running"),
        "engine_waiting": await metric(session, "vllm:num_requests_waiting"),
    }


async def until_idle(
    session: aiohttp.ClientSession, seconds: float = 60, pause_seconds: float = 0.01
) -> float | None:
    """Wait until no request runs or waits; return how long that took, None if too long."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        now = await pools(session)
        if not now["running_requests"] and not now["waiting_requests"]:
            return time.monotonic() - start
        await asyncio.sleep(pause_seconds)
    return None


async def metric(session: aiohttp.ClientSession, name: str, **labels: str) -> float:
    """Return the sum of a metric over its labels, or over those with these values."""
    async with session.get("/metrics") as response:
        return sum_of_metric(await response.text(), name, **labels)


async def refusals(session: aiohttp.ClientSession) -> dict[str, float]:
    """Return how many requests were refused, by reason; reasons without any are left out."""
    async with session.get("/metrics") as response:
        text = await response.text()
    reasons = re.findall(r'^emo_serve_refused_requests_total{reason="(\w+)"} (\S+)$', text, re.M)
    return {reason: float(count) for reason, count in reasons if float(count)}


def sum_of_metric(text: str, name: str, **labels: str) -> float:
    """Return the same from the text of `/metrics`."""
    total = 0.0
    for line in text.splitlines():
        key, _, value = line.rpartition(" ")
        found, _, rest = key.partition("{")
        if found == name and all(f'{label}="{of}"' in rest for label, of in labels.items()):
            total += float(value)
    return total
