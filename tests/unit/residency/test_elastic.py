"""Elastic pools: what a request begins with, how the rest follows, and what stays of a pool."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from emo_serve.errors import PoolLoadFailed
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel
from emo_serve.pools.sizes import at_size
from emo_serve.residency.elastic import Nested
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.ports import NullObserver
from tests.support.fake_engine import FakeEngine, settle
from tests.support.residency_world import PROFILE, Client, a_manager, loaded, state, states
from tests.unit.residency.test_traffic import (
    EXPERTS,
    NAMES,
    Request,
    Residency,
    live_busily,
)
from tests.unit.residency.test_traffic import passes as some_passes
from tests.unit.residency.test_traffic import which as some_number


def ranked(name: str, *best: int) -> ExpertPool:
    """Return a pool of a dense layer and one of 8 experts, which lists them best first."""
    scores = [-best.index(e) if e in best else -float(len(best) + e) for e in range(8)]
    model = PoolModel(implied=((), ()))
    return ExpertPool(name, (LayerExperts(best, tuple(scores)), None), model=model)


def nested(pool: ExpertPool, least: int = 1) -> Nested | None:
    """Return a pool's sizes, down to `least`; None for one without scores or too small."""
    most = max(map(len, pool.expert_ids))
    if not pool.has_scores or least >= most:
        return None
    return Nested(pool, range(least, most), lambda k: at_size(pool, k))


def sizes_of(pool: ExpertPool, least: int = 1) -> Nested:
    found = nested(pool, least)
    assert found is not None
    return found


MATH, CODE = ranked("math", 7, 3, 5, 1), ranked("code", 6, 2, 4, 0)


def experts_of(operations: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(copy.expert for copy in operation.copies) for operation in operations]


# -- sizes and steps --


@pytest.mark.parametrize("limit", range(5))
def test_the_largest_size_is_found_among_all(limit: int) -> None:
    family = Nested(ranked("all", *range(8)), range(1, 5), lambda k: ranked(f"s{k}", *range(k)))
    found = family.largest(lambda pool: len(pool.expert_ids[0]) <= limit)
    assert found == (limit or None)


@pytest.mark.parametrize(
    ("least", "whole", "begun", "expected"),
    [
        (4, 16, None, [4, 8, 12, 16]),
        (4, 16, 8, [12, 16]),
        (4, 16, 15, [16]),
        (1, 64, None, [1, 9, 17, 25, 33, 41, 49, 57, 64]),
        (3, 4, None, [3, 4]),
    ],
)
def test_a_pool_grows_in_at_most_eight_more_steps(
    least: int, whole: int, begun: int | None, expected: list[int]
) -> None:
    def of(k: int) -> ExpertPool:
        return ExpertPool(str(k), (LayerExperts(tuple(range(k))),))

    family = Nested(of(whole), range(least, whole), of)
    assert [len(pool.expert_ids[0]) for pool in family.steps(begun)] == expected


# -- what a request begins with --


async def test_a_resident_pool_serves_whole() -> None:
    manager = await loaded(FakeEngine(), MATH)
    assert manager.begin(sizes_of(MATH)) is MATH
    assert not len(manager._growth)


async def test_a_request_begins_when_the_first_experts_have_come_and_the_rest_follows() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    served = manager.begin(sizes_of(MATH, least=2))
    assert served.name == "math@2"
    client = Client(manager, served)
    await settle()
    assert experts_of(engine.held) == [(3, 7)], "the best first"
    engine.held[0].release()
    await settle()
    assert client.is_running and experts_of(engine.held) == [(1, 5)]
    later = manager.begin(sizes_of(MATH, least=2))
    assert later.name == "math@2", "what is on its way does not serve yet"
    engine.held[0].release()
    await settle()
    assert client.lease is not None and client.lease.pool.name == "math@2", "it keeps its size"
    assert state(manager, MATH) == "resident" and manager.begin(sizes_of(MATH)) is MATH
    await client.finish()
    manager.check_integrity()


async def test_a_request_begins_in_the_largest_size_that_other_pools_keep() -> None:
    engine = FakeEngine(is_holding=True)
    manager = await loaded(engine, ranked("other", 7, 3, 5), slots=6)
    served = manager.begin(sizes_of(MATH))
    assert served.name == "math@3"
    client = Client(manager, served)
    await settle()
    engine.held[0].release()  # a row; the growth needs the link and no row of its own
    await settle()
    assert client.is_running and client.lease is not None and client.lease.is_hit
    assert experts_of(engine.operations)[0] in [(), (1,)]
    for operation in list(engine.held):
        operation.release()
    await settle()
    assert state(manager, MATH) == "resident"
    await client.finish()


async def test_one_that_is_loading_as_a_whole_is_waited_for() -> None:
    engine = FakeEngine(is_holding=True)
    manager = a_manager(engine)
    operator = asyncio.create_task(manager.load(MATH))
    await settle()
    assert manager.begin(sizes_of(MATH)) is MATH
    engine.held[0].release()
    await operator


async def test_smaller_requests_are_counted_by_the_pool_that_was_asked_for() -> None:
    asked: list[str] = []

    class Recording(NullObserver):
        def count_smaller(self, pool: str) -> None:
            asked.append(pool)

    manager = a_manager(FakeEngine(), observer=Recording())
    async with manager.lease(manager.begin(sizes_of(MATH))):
        await settle()
    async with manager.lease(manager.begin(sizes_of(MATH))):
        pass
    assert asked == ["math"]


async def test_a_pool_larger_than_the_slab_serves_as_much_of_it_as_fits() -> None:
    manager = a_manager(FakeEngine(), slots=3)
    async with manager.lease(manager.begin(sizes_of(MATH))) as lease:
        assert lease.pool.name == "math@1"
    await settle()
    assert manager.begin(sizes_of(MATH)).name == "math@3"


# -- growth yields --


async def test_growth_waits_until_no_request_does_and_closes_nothing() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, CODE, slots=6)
    code = Client(manager, CODE)
    await settle()
    math = Client(manager, manager.begin(sizes_of(MATH, least=2)))
    await settle()
    assert code.is_running and math.is_running
    assert states(manager) == {"code": "resident", "math@2": "resident", "math": "waiting"}
    assert manager.statistics().waiting_requests == 0
    assert manager.begin(sizes_of(CODE)) is CODE, "growth alone closes nothing"
    other = Client(manager, ranked("other", 0, 1))  # waits for slots of math@2
    await settle()
    assert not other.is_running
    await math.finish()
    await settle()
    assert other.is_running, "before the growth, which asked first"
    await other.finish()
    await code.finish()
    await settle()
    assert state(manager, MATH) == "resident"
    manager.check_integrity()


async def test_growth_ends_with_the_definition_and_with_the_server() -> None:
    for end in (lambda manager: manager.retire(MATH), ResidencyManager.start_draining):
        engine = FakeEngine(is_holding=True)
        manager = a_manager(engine)
        client = Client(manager, manager.begin(sizes_of(MATH)))
        await settle()
        end(manager)
        engine.held[0].release()
        await client.finish()
        await settle()
        assert not engine.held and not len(manager._growth)
        assert await manager.drained(0)
        manager.check_integrity()


async def test_a_pool_that_an_operator_evicts_grows_when_it_is_asked_for_again() -> None:
    manager = await loaded(FakeEngine(), CODE, slots=6)
    code = Client(manager, CODE)
    await settle()
    async with manager.lease(manager.begin(sizes_of(MATH, least=2))):
        await settle()
    assert state(manager, MATH) == "waiting"
    await manager.evict(MATH)
    await settle()
    assert state(manager, MATH) is None and not len(manager._growth)
    manager.begin(sizes_of(MATH, least=2))
    await settle()
    assert state(manager, MATH) == "waiting"
    await code.finish()
    await settle()
    assert state(manager, MATH) == "resident"


async def test_a_growth_that_fails_leaves_requests_alone_and_is_tried_again() -> None:
    engine = FakeEngine()
    engine.unreadable = {(0, 5)}
    manager = a_manager(engine)
    async with manager.lease(manager.begin(sizes_of(MATH))) as lease:
        await settle()
        assert lease.pool.name == "math@1" and not len(manager._growth)
    engine.unreadable = set()
    manager.begin(sizes_of(MATH))
    await settle()
    assert state(manager, MATH) == "resident"


# -- shrinking --


async def test_a_pool_that_makes_room_leaves_its_best_experts() -> None:
    evictions: list[tuple[str, str]] = []

    class Recording(NullObserver):
        def count_eviction(self, pool: str, reason: str) -> None:
            evictions.append((pool, reason))

    small = await loaded(FakeEngine(), MATH, slots=5, shrink_to=nested, observer=Recording())
    await small.load(ranked("three", 0, 1, 2))
    assert evictions == [("math", "shrunk")]
    assert states(small) == {"math@2": "resident", "three": "resident"}
    small.check_integrity()


async def test_without_leave_a_pool_goes_whole() -> None:
    manager = await loaded(FakeEngine(), MATH, slots=5)
    await manager.load(ranked("three", 0, 1, 2))
    assert states(manager) == {"three": "resident"}


async def test_a_pool_whose_successor_cannot_be_read_stays_as_it_is() -> None:
    engine = FakeEngine()
    manager = await loaded(engine, MATH, slots=5, shrink_to=nested)
    engine.unreadable = {(0, 0)}
    with pytest.raises(PoolLoadFailed):
        await manager.load(ranked("three", 0, 1, 2))
    await settle()
    assert state(manager, MATH) == "resident"
    manager.check_integrity()


# -- everything at once, at random --


def a_family(seed: int) -> tuple[tuple[int, ...], ...]:
    """Return as many experts for each layer, the best first."""
    chance = random.Random(seed)
    size = chance.randint(1, 3)
    return tuple(tuple(chance.sample(range(count), min(count, size))) for count in EXPERTS)


def scored(best: tuple[int, ...], count: int) -> LayerExperts | None:
    if not count:
        return None
    ranks = (*best, *(expert for expert in range(count) if expert not in best))
    return LayerExperts(best, tuple(-float(ranks.index(expert)) for expert in range(count)))


class Elastic(Residency):
    """The machine of test_traffic with pools that have sizes, and requests that may begin small."""

    @staticmethod
    def pool_of(name: str, content: Any) -> ExpertPool:
        layers = zip(a_family(len(str(content)) + sum(map(sum, content[0]))), EXPERTS, strict=True)
        model = PoolModel(implied=((),) * len(EXPERTS))
        return ExpertPool(name, tuple(scored(*pair) for pair in layers), content[1], model=model)

    def fresh_manager(
        self, max_waiting: int = 1, policy: str = "lru", **options: Any
    ) -> ResidencyManager:
        return super().fresh_manager(max_waiting, policy, shrink_to=nested, **options)

    @rule(number=some_number, count=st.integers(1, 3), passes=some_passes)
    def ask_elastic(self, number: int, count: int, passes: int) -> None:
        pool = self.pools[NAMES[number % len(NAMES)]]

        def action() -> None:
            for _ in range(count):
                family = nested(pool)
                served = pool if family is None else self.manager.begin(family)
                self.outcomes["smaller"] += served is not pool
                request = Request(self, served)
                self.requests[self.loop.create_task(request.run())] = request

        self.soon(action, passes)

    def check_requests(self) -> None:
        super().check_requests()
        queue = self.manager._queue
        if queue._closing_for is not None and queue._closing_for in queue.pending:
            waiting = queue._closing_for.waiters
            assert not queue._closing_for.is_growth or not waiting, "growth closes nothing"

    @property
    def is_busy(self) -> bool:
        return super().is_busy or len(self.manager._growth) > 0


TestElastic = Elastic.TestCase
TestElastic.settings = PROFILE


@pytest.mark.parametrize("seed", range(10))
def test_a_busy_elastic_life(seed: int) -> None:
    """The same machine, busier."""
    chance, machine = random.Random(seed), Elastic()

    def ask_elastic(passes: int) -> None:
        machine.ask_elastic(chance.randrange(100), chance.randint(1, 3), passes)

    live_busily(machine, chance, {ask_elastic: 40})
    assert machine.outcomes["smaller"]
