"""What a server must keep while it is abused: its health, its memory, its tables."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

__all__ = ["HealthWatch", "broken_tables", "memory_of", "watched"]

_PAUSE_SECONDS = 0.25
_HEALTH_SECONDS = 30.0
"""For one answer of /health on a busy machine; a stalled server takes longer."""


@dataclass
class HealthWatch:
    """What /health answered so far: how many times well, and what else."""

    num_good: int = 0
    faults: list[str] = field(default_factory=list)


@contextmanager
def watched(url: str) -> Iterator[HealthWatch]:
    """Ask for /health again and again in a thread, until the block ends."""
    watch, ending = HealthWatch(), threading.Event()

    def ask() -> None:
        while not ending.wait(_PAUSE_SECONDS):
            try:
                status = httpx.get(f"{url}/health", timeout=_HEALTH_SECONDS).status_code
            except httpx.HTTPError as error:
                watch.faults.append(f"/health: {type(error).__name__}: {error}")
                continue
            if status == 200:
                watch.num_good += 1
            else:
                watch.faults.append(f"/health: {status}")

    thread = threading.Thread(target=ask, name="health", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ending.set()
        thread.join()


def memory_of(pid: int) -> dict[str, int]:
    """Return the resident bytes of a server's processes by what they are."""
    found: dict[str, int] = {}
    front = psutil.Process(pid)
    for process in (front, *front.children(recursive=True)):
        title = " ".join(process.cmdline())
        role = "front end" if process == front else "engine" if "EngineCore" in title else ""
        role = role or ("worker" if "Worker" in title else "others")
        found[role] = found.get(role, 0) + process.memory_info().rss
    return found


def broken_tables(pools: dict[str, Any]) -> list[str]:
    """Return what the answer of GET /v1/pools shows that an idle server must not have."""
    found = []
    for card in pools["data"]:
        for count in ("running_requests", "waiting_requests"):
            if card[count]:
                found.append(f"pool {card['name']}: {count} is {card[count]}")
        if card["state"] not in ("absent", "resident", "streamed"):
            found.append(f"pool {card['name']} is {card['state']}")
    slots = pools["slots"]
    if slots["used"] + slots["free"] != slots["total"] or slots["leased"]:
        found.append(f"slots: {slots}")
    return found
