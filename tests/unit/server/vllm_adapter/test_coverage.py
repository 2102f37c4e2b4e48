"""Accounts of coverage: every sum reaches its request once, whichever client reads or leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.residency.virtual_time import run
from emo_serve.errors import EngineDead
from emo_serve.server.coverage import CoverageSum, share_of
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from tests.support.fake_engine import settle


@dataclass
class FakeWorkers:
    """Sums by account, handed over once; a read takes `seconds` and may not overlap another.

    If `is_late`, what is routed while a read is under way waits for the next one.
    """

    seconds: float = 0.0
    is_late: bool = False
    error: Exception | None = None
    sums: dict[int, CoverageSum] = field(default_factory=dict)
    num_reads: int = 0
    observed: list[tuple[str, float]] = field(default_factory=list)
    _is_reading: bool = False

    def route(self, account: int, mass: float, tokens: int = 1) -> None:
        self.sums[account] = self.sums.get(account, CoverageSum(0.0, 0)) + CoverageSum(mass, tokens)

    async def read(self) -> dict[int, CoverageSum]:
        assert not self._is_reading
        self._is_reading = True
        self.num_reads += 1
        try:
            taken = self._take() if self.is_late else None
            await asyncio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
            return self._take() if taken is None else taken
        finally:
            self._is_reading = False

    def _take(self) -> dict[int, CoverageSum]:
        taken, self.sums = self.sums, {}
        return taken

    def observe(self, pool: str, share: float) -> None:
        self.observed.append((pool, share))

    def book(self) -> CoverageBook:
        return CoverageBook(self.read, self.observe)


# -- one account --


async def test_numbers_begin_at_one_and_are_never_used_twice() -> None:
    book = FakeWorkers().book()
    numbers = [book.open("math"), book.open("code")]
    for number in numbers:
        await book.result(number)
    assert [*numbers, book.open("math")] == [1, 2, 3]


async def test_a_result_is_read_at_once_and_observed() -> None:
    workers = FakeWorkers()
    book = workers.book()
    account = book.open("math")
    workers.route(account, 1.5, 2)
    assert await book.result(account) == CoverageSum(1.5, 2)
    assert workers.observed == [("math", 0.75)]
    assert book.num_accounts == 0


async def test_sums_of_one_account_from_several_reads_add_up() -> None:
    workers = FakeWorkers()
    book = workers.book()
    first, other = book.open("math"), book.open("code")
    for mass in (0.25, 1.0):
        workers.route(first, mass)
        workers.route(other, 0.5)
        await book.result(book.open("law"))  # a read for another request
    assert await book.result(first) == CoverageSum(1.25, 2)
    assert await book.result(other) == CoverageSum(1.0, 2)


async def test_nothing_routed_is_no_coverage_and_is_not_observed() -> None:
    workers = FakeWorkers()
    book = workers.book()
    account, empty = book.open("math"), book.open("math")
    workers.sums[empty] = CoverageSum(0.0, 0)
    assert await book.result(account) is None
    assert await book.result(empty) is None
    assert workers.observed == []


async def test_what_is_routed_for_a_forgotten_account_is_dropped() -> None:
    workers = FakeWorkers()
    book = workers.book()
    account = book.open("math")
    workers.route(account, 0.5)
    await book.result(account)
    workers.route(account, 0.9)
    book.close(account)
    await book.result(book.open("code"))
    assert (workers.observed, book.num_accounts) == ([("math", 0.5)], 0)


def test_a_share_is_at_most_one_whatever_was_rounded() -> None:
    assert share_of(CoverageSum(3.0000001, 3)) == 1.0
    assert share_of(CoverageSum(1.0, 4)) == 0.25


# -- reads --


def test_an_account_closed_during_a_read_is_final_after_the_next() -> None:
    async def program() -> None:
        workers = FakeWorkers(seconds=0.5, is_late=True)
        book = workers.book()
        account = book.open("math")
        workers.route(account, 0.2)
        reading = asyncio.create_task(book.result(book.open("code")))
        await asyncio.sleep(0.1)
        workers.route(account, 0.6)  # the read under way has passed it
        book.close(account)
        await reading
        assert (workers.observed, book.num_accounts) == ([], 1)
        await book.result(book.open("code"))
        assert workers.observed == [("math", 0.4)]

    run(program())


def test_many_results_share_one_read_after_the_one_under_way() -> None:
    async def program() -> None:
        workers = FakeWorkers(seconds=0.5, is_late=True)
        book = workers.book()
        first = asyncio.create_task(book.result(book.open("math")))
        await asyncio.sleep(0.1)
        accounts = [book.open("math") for _ in range(20)]
        for account in accounts:
            workers.route(account, account / 100)
        results = await asyncio.gather(*map(book.result, accounts))
        assert results == [CoverageSum(account / 100, 1) for account in accounts]
        assert (await first, workers.num_reads) == (None, 2)

    run(program())


def test_a_client_that_leaves_does_not_lose_others_sums() -> None:
    async def program() -> None:
        workers = FakeWorkers(seconds=0.5, is_late=True)
        book = workers.book()
        stays, leaves = book.open("math"), book.open("code")
        workers.route(stays, 0.5)
        workers.route(leaves, 0.25)
        leaving = asyncio.create_task(book.result(leaves))
        await asyncio.sleep(0.1)
        leaving.cancel()
        assert await book.result(stays) == CoverageSum(0.5, 1)
        assert sorted(workers.observed) == [("code", 0.25), ("math", 0.5)]

    run(program())


# -- reading on and on --


def test_it_reads_once_a_second_while_there_are_accounts_and_an_idle_server_asks_nothing() -> None:
    async def program() -> None:
        workers = FakeWorkers()
        book = workers.book()
        running = asyncio.create_task(book.run())
        await asyncio.sleep(100.0)
        assert workers.num_reads == 0
        account = book.open("math")
        await asyncio.sleep(9.5)
        assert workers.num_reads == 10
        workers.route(account, 0.5)
        book.close(account)
        await asyncio.sleep(100.0)
        assert workers.num_reads == 11
        assert (workers.observed, book.num_accounts) == ([("math", 0.5)], 0)
        running.cancel()

    run(program())


@pytest.mark.parametrize("call", [CoverageBook.run, lambda book: book.result(1)])
async def test_a_dead_engine_is_no_error_of_ours(
    call: Callable[[CoverageBook], Awaitable[object]],
) -> None:
    book = FakeWorkers(error=EngineDead("gone")).book()
    book.open("math")
    assert await call(book) is None
    await settle()


async def test_another_error_is_told() -> None:
    book = FakeWorkers(error=KeyError("coverage")).book()
    with pytest.raises(KeyError):
        await book.result(book.open("math"))


# -- traffic --

REQUESTS = st.lists(
    st.tuples(
        st.floats(0.0, 5.0),  # when it comes
        st.lists(st.floats(0.0, 1.0), max_size=4),  # seconds before each token
        st.sampled_from(["close", "result", "leave"]),
    ),
    max_size=12,
)


@given(REQUESTS, st.floats(0.0, 2.0), st.booleans())
def test_every_token_is_counted_once_for_its_own_request(
    requests: list[tuple[float, list[float], str]], read_seconds: float, is_late: bool
) -> None:
    """Pool, mass and tokens are the request's own, so that a mix-up shows in what is observed."""
    workers = FakeWorkers(read_seconds, is_late)
    results: dict[int, CoverageSum | None] = {}

    async def request(
        book: CoverageBook, number: int, at: float, pauses: list[float], end: str
    ) -> None:
        await asyncio.sleep(at)
        account = book.open(f"pool-{number}")
        for pause in pauses:
            await asyncio.sleep(pause)
            workers.route(account, 1 / (number + 2))
        if end == "close":
            book.close(account)
            return
        asking = asyncio.create_task(book.result(account))
        if end == "leave":
            await asyncio.sleep(read_seconds / 2)
            asking.cancel()
            await asyncio.wait((asking,))
        else:
            results[number] = await asking

    async def program() -> None:
        book = workers.book()
        running = asyncio.create_task(book.run())
        await asyncio.gather(*(request(book, i, *args) for i, args in enumerate(requests)))
        await asyncio.sleep(10.0)
        assert book.num_accounts == 0
        assert not running.done()
        running.cancel()

    run(program())
    routed = {i: len(pauses) for i, (_, pauses, _) in enumerate(requests)}
    expected = {f"pool-{i}": 1 / (i + 2) for i, tokens in routed.items() if tokens}
    assert Counter(pool for pool, _ in workers.observed) == Counter(expected.keys())
    for pool, share in workers.observed:
        assert share == pytest.approx(expected[pool])
    for i, result in results.items():
        assert (result.tokens if result else 0) == routed[i]
    assert len(results) == sum(end == "result" for _, _, end in requests)
