"""Worker calls: numbered, checked on every rank, raced with the engine's death."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from emo_serve.errors import EngineDead
from emo_serve.residency.slots import Copy
from emo_serve.server import engine_calls
from emo_serve.server.engine_calls import WorkerCalls
from tests.fakes import settle

DESCRIPTION = {
    "trunk_bytes": 100,
    "slab_bytes": 64,
    "slot_bytes": 8,
    "num_slots": [4, 4],
    "dtype": "float32",
    "moe_backend": "cpu",
    "routes_by_pool": True,
}


class Workers:
    """Answer as the worker extension does, on some ranks; `spoil` changes one rank's reply."""

    def __init__(self, num_ranks: int = 2) -> None:
        self.num_ranks = num_ranks
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.spoil: dict[str, Any] = {}
        self.is_dead = False
        self.is_silent = False

    async def __call__(self, method: str, args: tuple[Any, ...]) -> Sequence[dict[str, Any]]:
        self.calls.append((method, args))
        while self.is_silent:
            await asyncio.Event().wait()
        reply = {"call_id": args[0], "ok": True, "error": None} | DESCRIPTION
        replies = [reply | {"bytes_read": 10 + r, "seconds": 0.5} for r in range(self.num_ranks)]
        replies[-1] |= self.spoil
        return replies


def calls_of(workers: Workers) -> WorkerCalls:
    return WorkerCalls(workers, lambda: workers.is_dead)


async def test_publishing_sends_plain_lists_under_a_new_number_each() -> None:
    workers = Workers()
    calls = calls_of(workers)
    await calls.publish_pool(3, ((1, 2), ()), 1.5)
    await calls.publish_pool(4, ((0,), (1,)), 1.0)
    assert workers.calls == [
        ("emo_publish_pool", (1, 3, [[1, 2], []], 1.5)),
        ("emo_publish_pool", (2, 4, [[0], [1]], 1.0)),
    ]


async def test_a_long_load_goes_in_parts_and_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_calls, "_COPIES_PER_CALL", 2)
    workers = Workers()
    heard: list[tuple[int, int]] = []
    calls = WorkerCalls(workers, lambda: False, lambda done, total: heard.append((done, total)))
    report = await calls.load_experts([Copy(0, expert, expert) for expert in range(5)])
    assert [args[1] for _, args in workers.calls] == [
        [[0, 0, 0], [0, 1, 1]],
        [[0, 2, 2], [0, 3, 3]],
        [[0, 4, 4]],
    ]
    assert heard == [(2, 5), (4, 5), (5, 5)]
    assert report.bytes_read == 3 * 11  # the rank that read most, three times
    assert report.seconds == 1.5


async def test_describing_takes_the_largest_rank() -> None:
    workers = Workers()
    workers.spoil = {"trunk_bytes": 140}
    facts = await calls_of(workers).describe()
    assert (facts.num_ranks, facts.trunk_bytes, facts.num_slots) == (2, 140, (4, 4))
    assert facts.slot_bytes_all_ranks == 16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"ok": False, "error": "no such file"}, "failed on rank 1: no such file"),
        ({"call_id": 99}, "rank 1 answered call 99"),
        ({"call_id": None}, "rank 1 answered call None"),
    ],
)
async def test_one_bad_rank_fails_the_call(spoil: dict[str, Any], message: str) -> None:
    workers = Workers()
    workers.spoil = spoil
    with pytest.raises(EngineDead, match=message):
        await calls_of(workers).publish_pool(1, ((0,),), 1.0)


async def test_a_call_to_an_engine_that_dies_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_calls, "_POLL_SECONDS", 0.001)
    workers = Workers()
    workers.is_silent = True
    call = asyncio.create_task(calls_of(workers).describe())
    await settle()
    assert not call.done()
    workers.is_dead = True
    with pytest.raises(EngineDead, match="died during emo_describe"):
        await call


async def test_a_caller_that_goes_away_does_not_take_the_call_with_it() -> None:
    workers = Workers()
    release = asyncio.Event()
    finished: list[str] = []

    async def slow(method: str, args: tuple[Any, ...]) -> Sequence[dict[str, Any]]:
        await release.wait()
        finished.append(method)
        return await workers(method, args)

    call = asyncio.create_task(WorkerCalls(slow, lambda: False).describe())
    await settle()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    release.set()
    await settle()
    assert finished == ["emo_describe"]
