"""Whether the server is making progress, told from the engine's steps and its processes."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from emo_serve.server.health import Health, child_processes, stopped_among
from emo_serve.server.vllm_adapter.engine import has_work, note_steps
from tests.support.progress import wait_for


class World:
    """A server whose state a test sets, and the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.is_draining = self.is_dead = self.has_work = False
        self.stopped: str | None = None
        self.lags: list[float] = []
        self.health = Health(
            is_draining=lambda: self.is_draining,
            is_dead=lambda: self.is_dead,
            has_work=lambda: self.has_work,
            step_deadline_seconds=60.0,
            observe_lag=self.lags.append,
            find_stopped=lambda: self.stopped,
            clock=lambda: self.now,
        )


def test_an_idle_engine_has_no_age_and_work_starts_it() -> None:
    world = World()
    world.now += 500
    assert world.health.step_age_seconds() == 0 and world.health.why_not_ready() is None
    world.has_work = True
    assert world.health.step_age_seconds() == 0
    world.now += 7
    assert world.health.step_age_seconds() == 7
    world.health.note_step()
    assert world.health.step_age_seconds() == 0
    world.now += 3
    world.has_work = False
    assert world.health.step_age_seconds() == 0


def test_without_steps_it_is_not_ready_past_the_deadline_and_is_again_after_one() -> None:
    world = World()
    world.has_work = True
    world.now += 60
    assert world.health.why_not_ready() is None
    world.now += 1
    reason = world.health.why_not_ready()
    assert reason is not None and "no step for 61 s; the limit is 60 s (--step-deadline)" in reason
    world.health.note_step()
    assert world.health.why_not_ready() is None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"is_dead": True, "is_draining": True}, "the engine has died"),
        ({"is_draining": True}, "shutting down"),
        ({"stopped": "process 7 (VLLM::Worker)"}, "process 7 .* is stopped; continue it"),
    ],
)
def test_each_reason_is_named(state: dict[str, Any], reason: str) -> None:
    world = World()
    vars(world).update(state)
    assert re.search(reason, world.health.why_not_ready() or "")


async def test_it_measures_by_how_much_the_loop_is_late() -> None:
    world = World()
    measuring = asyncio.create_task(world.health.run())
    async with asyncio.timeout(60):
        while not world.lags:
            world.now += 5
            await asyncio.sleep(0.01)
    measuring.cancel()
    assert world.lags[0] > 4


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="SIGSTOP is seen in /proc")
def test_a_stopped_process_is_found_and_a_running_one_is_not(
    child: subprocess.Popen[bytes],
) -> None:
    children = child_processes()
    assert child.pid in {process.pid for process in children}
    assert stopped_among(children) is None
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: f"process {child.pid} " in (stopped_among(children) or ""))
    child.send_signal(signal.SIGCONT)
    wait_for(lambda: stopped_among(children) is None)


async def test_steps_are_noted_as_their_results_come() -> None:
    outputs: asyncio.Queue[str] = asyncio.Queue()
    requests = [1]
    engine: Any = SimpleNamespace(
        engine_core=SimpleNamespace(get_output_async=outputs.get),
        output_processor=SimpleNamespace(has_unfinished_requests=lambda: bool(requests)),
    )
    noted: list[int] = []
    note_steps(engine, lambda: noted.append(1))
    outputs.put_nowait("a step")
    assert await engine.engine_core.get_output_async() == "a step" and noted == [1]
    assert has_work(engine)
    requests.clear()
    assert not has_work(engine)
