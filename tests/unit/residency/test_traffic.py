"""Everything at once, at random: a state machine over the manager, and a storm of clients.

What is checked after every step, whatever happened: the tables agree; a request that has its lease
would be computed with just its pool's experts; what is leased or pinned stays; no request waits
for a pool that is open, or longer than the deadline. At the end all requests are served and, once
everything is evicted, the tables are as new.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from emo_serve.errors import (
    EngineDead,
    LoadDeadlineExceeded,
    PoolBlocked,
    PoolInUse,
    PoolLoadFailed,
    PoolTooLarge,
    RequestError,
    StateConflict,
    TooManyWaiting,
)
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.manager import Lease, ResidencyManager
from emo_serve.residency.policy import POLICIES, make_policy
from emo_serve.residency.records import ResidentPool
from emo_serve.residency.slots import SlotTable
from tests.support.fake_engine import SLOT_BYTES, FakeEngine, Operation, settle
from tests.support.residency_world import AB, AC, BC, PROFILE, A, B, C, D, a_pool, loaded

EXPERTS = (6, 0, 4)  # the second layer is dense
NAMES = "pqrst"
DEADLINE = 60.0

FAILURES = (None, None, PoolLoadFailed, EngineDead)
FOR_REQUESTS = (
    PoolTooLarge,
    PoolBlocked,
    TooManyWaiting,
    LoadDeadlineExceeded,
    PoolLoadFailed,
    EngineDead,
)
FOR_OPERATORS = (*FOR_REQUESTS, PoolInUse, StateConflict)


def made_of(seed: int) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Return experts and temperature; hypothesis itself would draw the same few small sets."""
    chance = random.Random(seed)
    layers = (chance.sample(range(count), min(count, chance.randint(1, 3))) for count in EXPERTS)
    return tuple(map(tuple, layers)), chance.choice([1.0, 1.0, 1.0, 2.0])


contents = st.integers(0, 9999).map(made_of)
seldom = st.sampled_from([False, False, False, True])
which = st.integers(0, 99)  # of those there are when the time has come
passes = st.sampled_from([0, 0, 1, 2, 3, 8, 8])


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop that makes one pass when told to, and whose clock the test sets."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def one_pass(self) -> None:
        self.call_soon(self.stop)
        self.run_forever()


class Request:
    """A client's request or, without a lease, an operator's."""

    def __init__(self, machine: Residency, pool: ExpertPool) -> None:
        self.machine, self.pool, self.asked_at = machine, pool, math.inf
        self.lease: Lease | None = None
        self.end: asyncio.Future[None] = machine.loop.create_future()

    async def run(self) -> None:
        self.asked_at = self.machine.loop.now
        async with self.machine.manager.lease(self.pool) as self.lease:
            try:
                await self.end
            finally:
                self.lease = None

    def finish(self) -> None:
        if not self.end.done():
            self.end.set_result(None)


class Residency(RuleBasedStateMachine):
    """Whatever a rule does happens in the loop's next pass: rules without a pass meet in one."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = ManualLoop()
        self.reported: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.reported.append(context))
        self.engine = FakeEngine(is_holding=True)
        self.requests: dict[asyncio.Task[None], Request] = {}
        self.operators: list[asyncio.Task[None]] = []
        self.pinned: dict[str, ResidentPool] = {}
        self.outcomes: Counter[str] = Counter()

    @initialize(
        first=st.lists(contents, min_size=len(NAMES), max_size=len(NAMES)),
        slots=st.integers(3, 5),
        rows=st.sampled_from([9, 9, 4, 2]),
        max_waiting=st.sampled_from([100, 100, 4]),
        policy=st.sampled_from(POLICIES),
    )
    def start(self, first: list[Any], slots: int, rows: int, max_waiting: int, policy: str) -> None:
        self.pools = {
            name: self.pool_of(name, made) for name, made in zip(NAMES, first, strict=True)
        }
        self.slots, self.rows = slots, rows
        self.manager = self.fresh_manager(max_waiting, policy)

    def fresh_manager(
        self, max_waiting: int = 1, policy: str = "lru", **options: Any
    ) -> ResidencyManager:
        return ResidencyManager(
            SlotTable(EXPERTS, self.slots),
            self.rows,
            self.engine,
            slot_bytes=SLOT_BYTES,
            policy=make_policy(policy),
            max_waiting=max_waiting,
            load_deadline_seconds=DEADLINE,
            clock=self.loop.time,
            **options,
        )

    @staticmethod
    def pool_of(name: str, content: Any) -> ExpertPool:
        layers, temperature = content
        experts = (
            LayerExperts(ids) if count else None for ids, count in zip(layers, EXPERTS, strict=True)
        )
        return ExpertPool(name, tuple(experts), temperature)

    def chosen(self, numbers: list[int]) -> ExpertPool:
        """Return a pool or, of several that can be united, the union."""
        pools = [self.pools[NAMES[number % len(NAMES)]] for number in numbers]
        pool = pools[0]
        for other in pools[1:]:
            with suppress(RequestError):  # temperatures differ
                pool = pool.union(other)
        return pool

    def soon(self, action: Callable[[], object], passes: int) -> None:
        self.loop.call_soon(action)
        for _ in range(passes):
            self.loop.one_pass()
            self.check()

    def operate(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self.operators.append(task)

    # -- requests --

    @rule(numbers=st.lists(which, min_size=1, max_size=2), count=st.integers(1, 3), passes=passes)
    def ask(self, numbers: list[int], count: int, passes: int) -> None:
        pool = self.chosen(numbers)

        def action() -> None:
            for _ in range(count):
                request = Request(self, pool)
                self.requests[self.loop.create_task(request.run())] = request

        self.soon(action, passes)

    @rule(number=which, count=st.integers(1, 3), passes=passes)
    def finish(self, number: int, count: int, passes: int) -> None:
        def action() -> None:
            running = [one for one in self.requests.values() if one.lease]
            for turn in range(min(count, len(running))):
                running[(number + turn) % len(running)].finish()

        self.soon(action, passes)

    @rule(number=which, passes=passes)
    def cancel(self, number: int, passes: int) -> None:
        def action() -> None:
            if tasks := [*self.requests, *self.operators]:
                tasks[number % len(tasks)].cancel()

        self.soon(action, passes)

    # -- operators --

    @rule(numbers=st.lists(which, min_size=1, max_size=2), pin=seldom, passes=passes)
    def load(self, numbers: list[int], pin: bool, passes: int) -> None:
        pool = self.chosen(numbers)
        self.soon(lambda: self.operate(self.manager.load(pool, pin=pin)), passes)

    @rule(numbers=st.lists(which, min_size=1, max_size=2), drain=st.booleans(), passes=passes)
    def evict(self, numbers: list[int], drain: bool, passes: int) -> None:
        pool = self.chosen(numbers)
        self.soon(lambda: self.operate(self.manager.evict(pool, drain=drain)), passes)

    @rule(number=which, passes=passes)
    def unpin(self, number: int, passes: int) -> None:
        def action() -> None:
            if pinned := self.pinned_now():
                key = sorted(pinned)[number % len(pinned)]
                self.manager.unpin(pinned[key].pool)

        self.soon(action, passes)

    @rule(number=which, content=st.none() | contents, is_done=seldom, passes=passes)
    def redefine(self, number: int, content: Any, is_done: bool, passes: int) -> None:
        """Give a name other content, which another may have had all along, or remove and add it."""
        name = NAMES[number % len(NAMES)]

        def action() -> None:
            if not is_done:
                return
            old = self.pools[name]
            if content is not None:
                self.pools[name] = self.pool_of(name, content)
            defined = {pool.content_hash for pool in self.pools.values()}
            if content is None or old.content_hash not in defined:
                self.manager.retire(old)

        self.soon(action, passes)

    # -- the engine --

    @rule(passes=passes)
    def release(self, passes: int) -> None:
        self.soon(self.end_operations, passes)

    @rule(number=which, error=st.sampled_from(FAILURES), passes=passes)
    def end(self, number: int, error: type[Exception] | None, passes: int) -> None:
        failure = error("by chance") if error else None
        self.soon(lambda: self.end_operation(number, failure), passes)

    def end_operations(self) -> None:
        for _ in self.engine.held:
            self.end_operation(0, None)

    def end_operation(self, number: int, error: Exception | None) -> None:
        held: list[Operation] = [one for one in self.engine.held if not one.done.done()]
        if held and error is None:
            held[number % len(held)].release()
        elif held and error is not None:
            held[number % len(held)].fail(error)

    @rule(place=st.sampled_from([None, None, None, None, (0, 0), (2, 1)]))
    def spoil(self, place: tuple[int, int] | None) -> None:
        self.engine.unreadable = {place} if place else set()

    # -- time --

    @rule(
        seconds=st.sampled_from([0.0, 1.0, 25.0, 70.0]),
        passes=st.integers(8, 16),
        is_releasing=st.booleans(),
    )
    def wait(self, seconds: float, passes: int, is_releasing: bool) -> None:
        """Let time pass; with the loads ending too, since hypothesis leaves out rules for a run."""
        self.loop.now += seconds
        self.soon(self.end_operations if is_releasing else lambda: None, passes)
        for request in self.requests.values():
            assert request.lease or self.loop.now <= request.asked_at + DEADLINE

    # -- what must hold --

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        assert not self.reported, self.reported
        self.check_requests()
        self.check_pins()

    def check_requests(self) -> None:
        running: Counter[str] = Counter()
        for task, request in list(self.requests.items()):
            if task.done():
                self.note(task, FOR_REQUESTS)
                del self.requests[task]
            elif request.lease is not None:
                assert self.engine.serves(request.lease.row, request.pool), request.pool
                running[request.pool.content_hash] += 1
        resident = {one.key: one for one in self.manager._resident}
        for key, count in running.items():
            assert resident[key].leases >= count
        for task in [task for task in self.operators if task.done()]:
            self.note(task, FOR_OPERATORS)
            self.operators.remove(task)

    def check_pins(self) -> None:
        pinned = self.pinned_now()
        for key in pinned.keys() & self.pinned.keys():
            assert pinned[key] is self.pinned[key], "a pinned pool was evicted"
        self.pinned = pinned

    def pinned_now(self) -> dict[str, ResidentPool]:
        resident = self.manager._resident
        return {one.key: one for one in resident if resident.is_pinned(one.key)}

    def note(self, task: asyncio.Task[None], allowed: tuple[type[Exception], ...]) -> None:
        error = None if task.cancelled() else task.exception()
        assert error is None or isinstance(error, allowed), error
        self.outcomes[type(error).__name__] += 1

    # -- the end --

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.serve_everything()
            self.evict_everything()
        assert not asyncio.all_tasks(self.loop)
        self.loop.close()

    def serve_everything(self) -> None:
        """Finish and release until nothing is left, with no help from deadlines."""
        self.engine.unreadable = set()
        self.soon(lambda: None, passes=5)  # for what the last rules brought
        for _ in range(2000):
            if not self.is_busy:
                break
            for request in self.requests.values():
                if request.lease:
                    request.finish()
            self.soon(lambda: self.end_operation(0, None), passes=1)
        assert not self.is_busy, "a request or operator hangs"
        self.check()
        stats = self.manager.statistics()
        assert (stats.running_requests, stats.waiting_requests, stats.leased_slots) == (0, 0, 0)
        self.run(self.manager.drained(timeout_seconds=0.0))
        assert {pool.state for pool in stats.pools} <= {"resident"}

    @property
    def is_busy(self) -> bool:
        return bool(self.requests or self.operators or self.manager._queue._loads._tasks)

    def evict_everything(self) -> None:
        for resident in list(self.manager._resident):
            self.soon(lambda: self.manager.unpin(resident.pool), passes=1)  # noqa: B023
            self.run(self.manager.evict(resident.pool))
        empty, fresh = self.manager.statistics(), self.fresh_manager().statistics()
        assert (empty.layers, empty.pools, empty.free_rows) == (fresh.layers, (), fresh.free_rows)

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)
        self.check()


TestResidency = Residency.TestCase
TestResidency.settings = PROFILE


@pytest.mark.parametrize("seed", range(10))
def test_a_busy_life(seed: int) -> None:
    """The same machine, busier: hypothesis leaves some rules out of every run, this never does."""
    live_busily(Residency(), random.Random(seed), {})


def live_busily(
    machine: Residency, chance: random.Random, more: dict[Callable[[int], object], int]
) -> None:
    """Apply a machine's rules, and `more` with their weights, to its end."""

    def which() -> int:
        return chance.randrange(100)

    def some() -> list[int]:
        return [which() for _ in range(chance.choice([1, 1, 2]))]

    def content() -> Any:
        return made_of(which())

    machine.start(
        first=[content() for _ in NAMES],
        slots=chance.choice([3, 4, 5]),
        rows=chance.choice([9, 9, 4, 3]),
        max_waiting=chance.choice([100, 100, 6]),
        policy=chance.choice(POLICIES),
    )
    rules: dict[Callable[[int], object], int] = {
        lambda n: machine.ask(numbers=some(), count=chance.randint(1, 3), passes=n): 25,
        lambda n: machine.finish(number=which(), count=chance.randint(1, 3), passes=n): 20,
        lambda n: machine.cancel(number=which(), passes=n): 7,
        lambda n: machine.release(passes=n): 18,
        lambda n: machine.end(number=which(), error=chance.choice(FAILURES), passes=n): 4,
        lambda n: machine.load(numbers=some(), pin=chance.random() < 0.3, passes=n): 5,
        lambda n: machine.unpin(number=which(), passes=n): 4,
        lambda n: machine.evict(numbers=some(), drain=chance.random() < 0.5, passes=n): 4,
        lambda n: machine.redefine(
            number=which(), content=chance.choice([None, content()]), is_done=True, passes=n
        ): 3,
        lambda n: machine.spoil(place=chance.choice([None, None, (0, 0)])): 2,
        lambda n: machine.wait(
            seconds=chance.choice([0.0, 1.0, 25.0, 70.0]),
            passes=chance.randint(8, 12),
            is_releasing=chance.random() < 0.5,
        ): 8,
    } | more
    for do in chance.choices(list(rules), list(rules.values()), k=150):
        do(chance.choice([0, 0, 1, 1, 2, 3, 6]))
    stats = machine.manager.statistics()
    machine.teardown()
    assert stats.loads and machine.outcomes


# -- a storm --


@pytest.mark.parametrize("seed", range(8))
async def test_random_traffic_never_finds_a_wrong_row(seed: int) -> None:
    """Leases, cancellations and failures at random; every granted row holds its own pool."""
    chance = random.Random(seed)
    engine = FakeEngine(is_holding=True)
    pools = [A, B, C, D, AB, BC, AC, a_pool("hot", 0, 1, temperature=2.0), a_pool("e", 1, 2, 7)]
    manager = await loaded(engine, A, B, slots=5, rows=5)
    served = 0

    async def request() -> None:
        nonlocal served
        pool = chance.choice(pools)
        async with AsyncExitStack() as stack:
            try:
                lease = await stack.enter_async_context(manager.lease(pool))
            except (EngineDead, PoolLoadFailed):
                return
            for _ in range(chance.randrange(4)):
                assert engine.serves(lease.row, pool)
                await asyncio.sleep(0)
            served += 1

    requests: list[asyncio.Task[None]] = []
    for _ in range(400):
        requests.append(asyncio.create_task(request()))
        held = [operation for operation in engine.held if not operation.done.done()]
        if held and chance.random() < 0.7:
            operation = chance.choice(held)
            if chance.random() < 0.1:
                operation.fail(chance.choice([EngineDead, PoolLoadFailed])("by chance"))
            else:
                operation.release()
        if chance.random() < 0.2:
            chance.choice(requests).cancel()
        await asyncio.sleep(0)
        manager.check_integrity()
    while any(not finished.done() for finished in requests):
        if engine.held:
            engine.held[0].release()
        await settle()
        manager.check_integrity()
    for finished in requests:
        assert finished.cancelled() or finished.exception() is None
    assert served > 100
    stats = manager.statistics()
    assert (stats.running_requests, stats.waiting_requests) == (0, 0)
