"""The virtual clock: exact, quick, in order, and loud about programs that would wait for ever."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.residency.virtual_time import DeadlockError, run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_it_starts_at_zero_and_returns_the_result() -> None:
    async def program() -> float:
        return now()

    assert run(program()) == 0.0


def test_a_month_takes_no_time() -> None:
    async def program() -> float:
        await asyncio.sleep(30 * 86400.0)
        return now()

    start = time.monotonic()
    assert run(program()) == 30 * 86400.0
    assert time.monotonic() - start < 10


def test_sleepers_wake_in_order_each_at_its_own_time() -> None:
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((name, now()))

    async def program() -> None:
        await asyncio.gather(sleeper("c", 3.0), sleeper("a", 1.0), sleeper("b", 2.5))

    run(program())
    assert woken == [("a", 1.0), ("b", 2.5), ("c", 3.0)]


def test_the_clock_stands_still_while_anything_is_ready() -> None:
    async def program() -> float:
        timer = asyncio.create_task(asyncio.sleep(1.0))
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not timer.done()
        timer.cancel()
        return now()

    assert run(program()) == 0.0


def test_timeouts_and_events_work_in_it() -> None:
    async def program() -> float:
        event = asyncio.Event()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await event.wait()
        asyncio.get_running_loop().call_later(5.0, event.set)
        await event.wait()
        return now()

    assert run(program()) == 65.0


def test_a_program_that_nothing_will_wake_is_an_error() -> None:
    cleaned: list[str] = []

    async def program() -> None:
        await asyncio.sleep(2.0)
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("up")

    with pytest.raises(DeadlockError, match=r"at 2\.000 s"):
        run(program())
    assert cleaned == ["up"]


def test_what_the_program_raises_comes_out() -> None:
    async def program() -> None:
        await asyncio.sleep(1.0)
        raise ValueError("of the program")

    with pytest.raises(ValueError, match="of the program"):
        run(program())


def test_tasks_left_over_are_cancelled_and_two_runs_share_nothing() -> None:
    async def program() -> float:
        left_over = asyncio.create_task(asyncio.sleep(100.0))
        await asyncio.sleep(1.0)
        assert not left_over.done()
        return now()

    assert [run(program()), run(program())] == [1.0, 1.0]
