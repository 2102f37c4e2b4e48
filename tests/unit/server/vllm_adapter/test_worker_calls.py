"""Worker calls: numbered, checked on every rank, raced with the engine's death; loads polled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from emo_serve.errors import CheckpointError, EngineDead, PoolLoadFailed
from emo_serve.residency.slots import Copy
from emo_serve.server.vllm_adapter import worker_calls
from emo_serve.server.vllm_adapter.worker_calls import WorkerCalls

DESCRIPTION = {
    "rank": 0,
    "stage": 0,
    "trunk_bytes": 100,
    "slab_bytes": 64,
    "slot_bytes": 8,
    "num_slots": [4, 4],
    "kv_cache_bytes": 32,
    "bytes_read": 100,
    "disk_reads": 0,
    "host_hits": 0,
    "host_bytes": 0,
    "host_experts": 0,
    "peak_rss_bytes": 1000,
    "dtype": "float32",
    "expert_dtype": "float8_e4m3fn",
    "moe_backend": "cpu",
    "model_runner": "v1",
    "routes_by_pool": True,
    "records_routing": True,
}
IDS = ((1, 2), ())
COPIES = [Copy(0, 1, 5), Copy(0, 2, 6)]


class Workers:
    """Answer as the worker extension does, on some ranks; `spoil` changes the last one's reply.

    `progress` holds, a poll each, how many copies every rank has made; both ranks publish when they
    have made all of COPIES.
    """

    def __init__(self, num_ranks: int = 2) -> None:
        self.num_ranks = num_ranks
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.progress: Iterator[Sequence[int]] = iter(())
        self.spoil: dict[str, Any] = {}
        self.is_dead = False
        self.is_silent = False

    async def __call__(self, method: str, args: tuple[Any, ...]) -> Sequence[dict[str, Any]]:
        self.calls.append((method, args))
        while self.is_silent:
            await asyncio.Event().wait()
        reply = {"call_id": args[0], "ok": True, "error": None} | DESCRIPTION
        replies = [dict(reply) for _ in range(self.num_ranks)]
        if method == "emo_finish_load":
            done = next(self.progress, [len(COPIES)] * self.num_ranks)
            replies = [
                r | self.load_state(n, rank)
                for rank, (r, n) in enumerate(zip(replies, done, strict=True))
            ]
        replies[-1] |= self.spoil
        return replies

    @staticmethod
    def load_state(done: int, rank: int) -> dict[str, Any]:
        return {
            "stage": 0,
            "state": "published" if done == len(COPIES) else "loading",
            "failure": None,
            "experts_copied": done,
            "bytes_copied": 8 * done,
            "bytes_read": 10 + rank,
            "disk_reads": rank,
            "host_hits": 2 - rank,
        }

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_calls, "_SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(worker_calls, "_LONGEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(worker_calls, "_DEATH_CHECK_SECONDS", 0.001)


def calls_of(workers: Workers, **options: Any) -> WorkerCalls:
    return WorkerCalls(workers, lambda: workers.is_dead, lambda experts: None, **options)


# -- loads --


@pytest.mark.usefixtures("no_waiting")
async def test_a_load_is_started_polled_and_published() -> None:
    workers = Workers()
    workers.progress = iter([[0, 0], [2, 1]])  # rank 0 publishes one poll before rank 1
    reported: list[tuple[int, int]] = []
    calls = calls_of(workers, on_copied=lambda done, total: reported.append((done, total)))
    report = await calls.make_resident(3, IDS, 1.5, COPIES)
    finish = (1, 3, [[1, 2], []], 1.5)
    assert workers.calls == [
        ("emo_start_load", (1, 1, [[0, 1, 5], [0, 2, 6]])),
        *(("emo_finish_load", (number, *finish)) for number in (2, 3, 4)),
    ]
    assert reported == [(0, 2), (1, 2), (2, 2)]
    assert (report.experts_copied, report.bytes_copied, report.bytes_read) == (2, 32, 21)
    assert report.host_hits == 1 and report.seconds >= 0
    assert (report.num_experts, report.slab_hits, report.disk_reads) == (2, 0, 1)


@pytest.mark.usefixtures("no_waiting")
async def test_nothing_to_copy_is_one_call() -> None:
    workers = Workers()
    calls = calls_of(workers)
    report = await calls.make_resident(3, IDS, 1.5, [])
    assert workers.calls == [("emo_publish_pool", (1, 3, [[1, 2], []], 1.5))]
    assert (report.experts_copied, report.bytes_copied, report.host_hits) == (0, 0, 0)
    assert (report.num_experts, report.slab_hits) == (2, 2)


@pytest.mark.usefixtures("no_waiting")
async def test_loads_have_numbers_of_their_own() -> None:
    workers = Workers()
    calls = calls_of(workers)
    await calls.make_resident(3, IDS, 1.0, COPIES)
    await calls.make_resident(4, IDS, 1.0, COPIES)
    assert [args[1] for method, args in workers.calls if method == "emo_start_load"] == [1, 2]


@pytest.mark.parametrize(
    ("seconds", "done", "total", "pause"),
    [
        (0.01, 0, 100, 0.04),  # nothing known yet: four times as long
        (0.02, 10, 30, 0.04),  # at this rate the rest takes that long
        (0.02, 19, 20, 0.005),  # nearly there
        (1.0, 1, 100, 0.25),  # progress is still reported often
        (1.0, 20, 20, 0.005),
    ],
)
def test_a_poll_comes_when_the_load_should_be_done(
    seconds: float, done: int, total: int, pause: float
) -> None:
    assert worker_calls._next_pause(seconds, done, total) == pytest.approx(pause)


@pytest.mark.usefixtures("no_waiting")
async def test_a_rank_that_fails_is_reported_when_no_rank_copies_any_more() -> None:
    workers = Workers()
    workers.progress = iter([[0, 0], [1, 0], [2, 0]])
    workers.spoil = {"state": "failed", "failure": "model.safetensors was truncated"}
    with pytest.raises(PoolLoadFailed, match=r"^model\.safetensors was truncated$"):
        await calls_of(workers).make_resident(3, IDS, 1.0, COPIES)
    assert workers.methods.count("emo_finish_load") == 3


@pytest.mark.usefixtures("no_waiting")
async def test_an_unknown_state_is_the_end() -> None:
    workers = Workers()
    workers.spoil = {"state": "asleep"}
    with pytest.raises(EngineDead, match="asleep"):
        await calls_of(workers).make_resident(3, IDS, 1.0, COPIES)


@pytest.mark.usefixtures("no_waiting")
async def test_a_reply_that_is_no_record_is_the_end() -> None:
    workers = Workers()
    workers.spoil = {"num_slots": [4, "many"], "dtype": None}
    with pytest.raises(
        EngineDead, match="^emo_describe: a reply is not a valid EngineDescription: "
    ) as dead:
        await calls_of(workers).describe()
    assert "num_slots.1 is 'many'" in str(dead.value) and "dtype is None" in str(dead.value)


@pytest.mark.usefixtures("no_waiting")
async def test_a_load_the_workers_refuse_is_the_end() -> None:
    workers = Workers()
    workers.spoil = {"ok": False, "error": "load 1 is still under way"}
    with pytest.raises(EngineDead, match="emo_start_load failed on rank 1: load 1 is still"):
        await calls_of(workers).make_resident(3, IDS, 1.0, COPIES)


@pytest.mark.usefixtures("no_waiting")
async def test_an_engine_that_dies_between_two_polls_ends_the_load() -> None:
    workers = Workers()
    workers.progress = iter([[0, 0]] * 10**6)
    load = asyncio.create_task(calls_of(workers).make_resident(3, IDS, 1.0, COPIES))
    while workers.methods.count("emo_finish_load") < 3:
        await asyncio.sleep(0)
    workers.is_dead = True
    with pytest.raises(EngineDead, match="died during emo_finish_load"):
        await load


def test_unreadable_experts_are_found_before_anything_is_asked() -> None:
    asked: list[tuple[int, int]] = []

    def check(experts: Iterable[tuple[int, int]]) -> None:
        for layer, expert in experts:
            asked.append((layer, expert))
            if expert == 2:
                raise CheckpointError("model.safetensors: experts.2 is gone")

    workers = Workers()
    calls = WorkerCalls(workers, lambda: False, check)
    calls.check_readable(COPIES[:1])
    with pytest.raises(PoolLoadFailed, match=r"model\.safetensors: experts\.2 is gone"):
        calls.check_readable(COPIES)
    assert asked == [(0, 1), (0, 1), (0, 2)] and not workers.calls


# -- every call --


@pytest.mark.usefixtures("no_waiting")
async def test_describing_takes_the_largest_rank() -> None:
    workers = Workers()
    workers.spoil = {"trunk_bytes": 140}
    facts = await calls_of(workers).describe()
    assert (facts.num_ranks, facts.trunk_bytes, facts.num_slots) == (2, 140, (4, 4))
    assert facts.slot_bytes_all_ranks == 16
    assert (facts.dtype, facts.expert_dtype) == ("float32", "float8_e4m3fn")


@pytest.mark.usefixtures("no_waiting")
async def test_the_slots_of_all_stages_are_counted() -> None:
    workers = Workers()
    workers.spoil = {"stage": 1, "num_slots": [3], "slot_bytes": 6}
    facts = await calls_of(workers).describe()
    assert (facts.num_ranks, facts.num_stages, facts.num_slots) == (2, 2, (4, 4, 3))
    assert facts.slot_bytes_all_ranks == 8, "an expert is on the ranks of one stage"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"ok": False, "error": "no such file"}, "failed on rank 1: no such file"),
        ({"call_id": 99}, "rank 1 answered call 99, not 1"),
        ({"call_id": None}, "rank 1 answered call None, not 1"),
    ],
)
@pytest.mark.usefixtures("no_waiting")
async def test_one_bad_rank_fails_the_call(spoil: dict[str, Any], message: str) -> None:
    workers = Workers()
    workers.spoil = spoil
    with pytest.raises(EngineDead, match=message):
        await calls_of(workers).make_resident(1, IDS, 1.0, [])


@pytest.mark.usefixtures("no_waiting")
async def test_a_call_to_an_engine_that_dies_ends() -> None:
    workers = Workers()
    workers.is_silent = True
    call = asyncio.create_task(calls_of(workers).describe())
    await asyncio.sleep(0.005)
    assert not call.done()
    workers.is_dead = True
    with pytest.raises(EngineDead, match="died during emo_describe"):
        await call


@pytest.mark.usefixtures("no_waiting")
async def test_a_caller_that_goes_away_does_not_take_the_call_with_it() -> None:
    workers = Workers()
    release = asyncio.Event()
    finished: list[str] = []

    async def slow(method: str, args: tuple[Any, ...]) -> Sequence[dict[str, Any]]:
        await release.wait()
        finished.append(method)
        return await workers(method, args)

    calls = WorkerCalls(slow, lambda: False, lambda experts: None)
    call = asyncio.create_task(calls.describe())
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    release.set()
    while not finished:
        await asyncio.sleep(0)
    assert finished == ["emo_describe"]
