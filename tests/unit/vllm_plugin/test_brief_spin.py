"""Readers of shared memory sleep when a step takes long, with vLLM's own queue."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast

from emo_serve.vllm_plugin.brief_spin import spin_briefly
from emo_serve.vllm_plugin.contract import END_WITH_PARENT_VARIABLE


def sleeps_of_waiting(seconds: float) -> int:
    """Return how often a reader goes to sleep that waits this long for a writer."""
    sleeps = 0

    class Poller(zmq.Poller):
        def poll(self, timeout: float | None = None) -> list[tuple[object, int]]:
            nonlocal sleeps
            sleeps += 1
            return super().poll(timeout)

    context = zmq.Context()
    address = "inproc://spin"
    writer = shm_broadcast.SpinCondition(False, context, address)
    reader = shm_broadcast.SpinCondition(True, context, address)
    reader.poller = Poller()
    reader.poller.register(reader.read_cancel_socket, zmq.POLLIN)
    reader.poller.register(reader.local_notify_socket, zmq.POLLIN)
    reader.record_read()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reader.wait(timeout_ms=20)
    found = sleeps
    writer.notify()
    reader.wait(timeout_ms=10_000)  # which returns at once, or the test's time limit is met
    context.destroy()
    return found


def test_a_reader_of_our_own_server_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast, "SpinCondition", shm_broadcast.SpinCondition)
    monkeypatch.delenv(END_WITH_PARENT_VARIABLE, raising=False)
    spin_briefly()  # plain `vllm serve`: as vLLM has it
    assert not sleeps_of_waiting(0.3)
    monkeypatch.setenv(END_WITH_PARENT_VARIABLE, "1")
    for _ in range(2):  # vLLM may register a plugin more than once
        spin_briefly()
        assert 0 < sleeps_of_waiting(0.3) <= 16, "each takes 20 ms"
    assert len(shm_broadcast.SpinCondition.__mro__) == 3, "wrapped once"


def test_no_notification_is_lost_soon_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_broadcast, "SpinCondition", shm_broadcast.SpinCondition)
    monkeypatch.setenv(END_WITH_PARENT_VARIABLE, "1")
    spin_briefly()
    context, address = zmq.Context(), f"ipc://{tmp_path}/notify"
    writer = shm_broadcast.SpinCondition(False, context, address)
    reader = shm_broadcast.SpinCondition(True, context, address)
    while not reader.poller.poll(10):  # until the reader is connected
        writer.notify()
    reader.local_notify_socket.recv()
    missing = 0
    for _ in range(100):  # of vLLM's own, about half are lost
        writer.notify()
        if reader.poller.poll(1000):
            reader.local_notify_socket.recv()
        else:
            missing += 1
    context.destroy()
    assert missing == 0
