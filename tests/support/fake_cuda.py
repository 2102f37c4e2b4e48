"""CUDA streams and pinned memory without a device: copies are made at once, events have come."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

__all__ = ["FakeStream", "pretend_streams"]


class FakeStream:
    """Stand for a CUDA stream, and for an event on it."""

    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self) -> FakeStream:
        return self

    def record(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


def pretend_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CudaMover run on memory that is not pinned, without a device."""
    for name in ("empty", "ones"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, pin_memory=False, f=plain, **k: f(*a, **k))
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
