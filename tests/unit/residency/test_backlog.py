"""The bound on admitted work: hard, fair among pools, and honest about when to come back."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.errors import TooManyQueued
from emo_serve.residency.backlog import Backlog, BacklogLimits, Place
from tests.support.fake_engine import FakeEngine
from tests.support.residency_world import A, B, C, a_pool, in_virtual_time, loaded, now


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def a_backlog(max_running: int = 4, max_queued: int = 10, clock: Time | None = None) -> Backlog:
    return Backlog(BacklogLimits(max_running, max_queued), clock or Time())


def flood(backlog: Backlog, pool: object = A) -> list[Place]:
    places = []
    with pytest.raises(TooManyQueued):
        while True:
            places.append(backlog.enter(pool))  # type: ignore[arg-type]
    return places


def test_one_pool_alone_fills_the_batch_and_most_of_the_queue() -> None:
    backlog = a_backlog(4, 10)
    assert len(flood(backlog)) == 4 + 8 == BacklogLimits(4, 10).max_alone
    backlog.check_integrity()


def test_a_refusal_names_what_is_held_the_limit_and_the_remedy() -> None:
    backlog = a_backlog()
    flood(backlog)
    backlog.enter(B)
    text = "12 of pool 'a' and 1 of other pools run or wait.* 4 at once and 10 more.*--max-queued"
    with pytest.raises(TooManyQueued, match=text) as caught:
        backlog.enter(A)
    assert caught.value.retry_after_seconds >= 1


def test_the_engine_is_never_left_idle_for_fairness() -> None:
    backlog = a_backlog(4, 0)
    assert len([backlog.enter(A) for _ in range(4)]) == 4
    flood(backlog, A)


@pytest.mark.parametrize("max_queued", [0, 1, 10])
def test_any_flood_leaves_room_for_the_first_request_of_every_other_pool(max_queued: int) -> None:
    backlog = a_backlog(4, max_queued)
    for number in range(20):
        flood(backlog, a_pool(f"p{number}", number % 8, temperature=1 + number))
    for number in range(20, 30):
        backlog.enter(a_pool(f"p{number}", number % 8, temperature=1 + number), 3)
    backlog.check_integrity()


def test_two_floods_share_alike_once_the_first_has_drained() -> None:
    backlog = a_backlog(40, 180)
    held = {"a": deque(flood(backlog, A)), "b": deque(flood(backlog, B))}
    for _ in range(100):  # both are always asked for more than they may have
        for name in held:
            held[name].popleft().release()
        for name, pool in (("a", A), ("b", B)):
            held[name] += flood(backlog, pool)
    assert abs(len(held["a"]) - len(held["b"])) <= 10
    assert 190 <= backlog.num_admitted <= 220


def test_completions_are_counted_not_requests() -> None:
    backlog = a_backlog(4, 10)
    backlog.enter(A, 8)
    backlog.enter(A, 4)
    with pytest.raises(TooManyQueued):
        backlog.enter(A)


def test_a_place_is_given_back_once() -> None:
    backlog = a_backlog()
    places = flood(backlog)
    for _ in range(3):
        places[0].release()
    assert backlog.num_admitted == 11
    backlog.enter(A)
    backlog.check_integrity()


def test_the_next_step_of_an_admitted_request_is_counted_and_not_refused() -> None:
    backlog = a_backlog()
    flood(backlog)
    backlog.enter(A, is_continued=True)
    assert backlog.num_admitted == 13


@given(
    st.integers(1, 8),
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.booleans()), max_size=200),
)
def test_the_bound_holds_but_for_first_requests(
    max_running: int, max_queued: int, steps: list[tuple[int, int, bool]]
) -> None:
    pools = [a_pool(f"p{number}", number) for number in range(6)]
    backlog, held = a_backlog(max_running, max_queued), {pool.name: [] for pool in pools}
    for number, size, is_end in steps:
        places: list[Place] = held[pools[number].name]
        if is_end and places:
            places.pop().release()
            continue
        before = backlog.num_admitted
        try:
            places.append(backlog.enter(pools[number], size))
        except TooManyQueued as error:
            assert places, "the first request of a pool is never refused"
            assert before + size > max_running, "the engine could have begun it"
            assert error.retry_after_seconds >= 1
        else:
            assert len(places) == 1 or backlog.num_admitted <= max_running + max_queued
        backlog.check_integrity()


# -- when to come back --


def test_refused_clients_are_told_to_come_back_one_after_the_other() -> None:
    clock = Time()
    backlog = a_backlog(4, 10, clock)
    places = flood(backlog)
    for _ in range(10):  # each runs 2 s: 2 end per second
        clock.seconds += 2
        for place in places[:4]:
            place.release()
        places = places[4:] + [backlog.enter(A) for _ in range(4)]
    told = []
    for _ in range(40):
        with pytest.raises(TooManyQueued) as caught:
            backlog.enter(A)
        told.append(caught.value.retry_after_seconds)
    assert told == sorted(told)
    assert told[0] <= 2
    assert 20 <= told[-1] <= 30  # 40 places at 2 per second, and a margin


@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["all at once", "over three seconds"])
@in_virtual_time
async def test_a_client_that_obeys_is_served_at_its_second_try_in_most_cases(spread: float) -> None:
    manager = await loaded(
        FakeEngine(), A, B, limits=BacklogLimits(8, 40), clock=asyncio.get_running_loop().time
    )
    batch, tries, ends = asyncio.Semaphore(8), [], []

    async def client(number: int) -> None:
        await asyncio.sleep(spread * number / 200)
        pool = B if number % 4 == 0 else A
        for attempt in range(1, 20):
            try:
                manager.check_admissible(pool)
                place = manager.enter(pool)
            except TooManyQueued as error:
                await asyncio.sleep(error.retry_after_seconds)
                continue
            tries.append(attempt)
            async with manager.lease(pool), batch:
                await asyncio.sleep(0.5 + number % 7 / 5)
            place.release()
            ends.append(now())
            return

    async with asyncio.TaskGroup() as clients:
        for number in range(200):
            clients.create_task(client(number))
    refused = [attempt for attempt in tries if attempt > 1]
    assert len(tries) == 200 and len(refused) > 50
    assert refused.count(2) >= 0.8 * len(refused), Counter(tries)
    assert sorted(ends)[180] < 45  # 8 at once, 1.1 s each: 28 s for all if none ever had to wait


async def test_the_manager_counts_from_admission_not_from_the_lease() -> None:
    manager = await loaded(FakeEngine(), A, limits=BacklogLimits(1, 5))
    places = [manager.enter(A) for _ in range(5)]
    with pytest.raises(TooManyQueued):
        manager.enter(A)
    manager.enter(C)
    places[0].release()
    manager.check_integrity()
