"""The drain: nothing new, everything old, and an end to waiting."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from starlette.types import Message, Scope, Send

from emo_serve.errors import Draining
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.shutdown import StopSignals, drain, stop_signals
from tests.support.fake_engine import settle
from tests.support.pool_services import ServiceUnderTest, service_of


class Generation:
    """An ASGI app like a beam search: two leases in turn, each held until the test steps it."""

    def __init__(self, service: ServiceUnderTest) -> None:
        self.service = service
        self.step = asyncio.Event()
        self.num_leases = 0

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        for _ in range(2):
            async with self.service.residency.lease(self.service.lookup.find("math")):
                self.num_leases += 1
                self.step.clear()
                await self.step.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def post(gate: Admission) -> int:
    statuses: list[int] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await gate(
        {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}, receive, send
    )
    return statuses[0]


@pytest.fixture
async def service() -> ServiceUnderTest:
    service = service_of()
    await service.manager.load(service.lookup.find("math"))
    return service


async def test_running_requests_finish_though_they_need_further_leases(
    service: ServiceUnderTest,
) -> None:
    generation = Generation(service)
    gate = Admission(generation)
    running = asyncio.create_task(post(gate))
    await settle()
    draining = asyncio.create_task(drain(gate, service.manager, 60))
    await settle()
    assert await post(gate) == 503
    for expected in (1, 2):
        assert generation.num_leases == expected
        assert not draining.done()
        generation.step.set()
        await settle()
    assert await running == 200
    assert await draining
    with pytest.raises(Draining):
        service.residency.admit("math")


async def test_a_lease_without_a_request_is_waited_for_too(service: ServiceUnderTest) -> None:
    gate = Admission(Generation(service))
    async with service.residency.lease(service.lookup.find("math")):
        draining = asyncio.create_task(drain(gate, service.manager, 60))
        await settle()
        assert not draining.done()
    assert await draining


async def test_a_drain_that_takes_too_long_says_so(service: ServiceUnderTest) -> None:
    gate = Admission(Generation(service))
    running = asyncio.create_task(post(gate))
    await settle()
    assert not await drain(gate, service.manager, 0.01)
    assert gate.is_closed
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_with_nothing_under_way_a_drain_ends_at_once(service: ServiceUnderTest) -> None:
    assert await drain(Admission(Generation(service)), service.manager, 0.0)


async def test_the_first_and_the_second_signal_are_told_apart() -> None:
    signals = StopSignals(asyncio.get_running_loop())
    os.kill(os.getpid(), signal.SIGTERM)
    await signals.first.wait()
    assert not signals.second.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    await signals.second.wait()


async def test_a_hangup_stops_too_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        assert stop_signals() == (signal.SIGTERM, signal.SIGINT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signals = StopSignals(asyncio.get_running_loop())
        os.kill(os.getpid(), signal.SIGHUP)
        await signals.first.wait()
    finally:
        signal.signal(signal.SIGHUP, before)
