"""The calls into the engine's workers: numbered, checked on every rank, never left hanging.

`WorkerCalls` is the residency manager's PoolEngine over vLLM's `collective_rpc`. A call runs
between two engine steps and blocks all streams while it lasts. So one call starts a load, which
then runs beside the engine's steps, and short calls poll and publish it. If the engine process
dies, a call gets no reply, and a timeout is not possible, because a late reply would be taken for
the next call's; so each call also watches the engine's error state. Workers reply with a record
instead of raising; one bad record from any rank fails the call.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from emo_serve.errors import CheckpointError, EngineDead, PoolLoadFailed
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.ports import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds
from emo_serve.server.coverage import CoverageSum
from emo_serve.vllm_plugin.contract import (
    CoverageReading,
    EngineDescription,
    LoadProgress,
    PoolUsage,
    RouterMass,
)

__all__ = ["EngineFacts", "WorkerCalls"]

_Reply = Mapping[str, Any]
_Record = TypeVar("_Record")
_Staged = TypeVar("_Staged", EngineDescription, LoadProgress)
_Number = TypeVar("_Number", int, float)
_PerLayer = tuple[tuple[_Number, ...], ...]
_READERS: dict[type, TypeAdapter[Any]] = {
    record: TypeAdapter(record)
    for record in (CoverageReading, EngineDescription, LoadProgress, PoolUsage, RouterMass)
}
_DEATH_CHECK_SECONDS = 0.5
# A poll costs the engine 1-2 ms between two steps: poll early, then when it should be done.
_SHORTEST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.25
_MOST_GROWTH = 4.0


@dataclass(frozen=True)
class EngineFacts:
    """What the workers hold; sizes are those of the largest rank.

    `num_stages` divide the layers under pipeline parallelism; the ranks of a stage hold a part each
    of the same experts. `num_slots` has one entry per MoE layer. `dtype` is that of the trunk and
    of activations, `expert_dtype` that of experts in their slots.
    """

    num_ranks: int
    num_stages: int
    trunk_bytes: int
    slab_bytes: int
    slot_bytes: int
    num_slots: tuple[int, ...]
    kv_cache_bytes: int
    dtype: str
    expert_dtype: str
    moe_backend: str
    routes_by_pool: bool
    records_routing: bool

    @property
    def slot_bytes_all_ranks(self) -> int:
        """Return the bytes of one expert of one layer on all devices together."""
        return self.slot_bytes * (self.num_ranks // self.num_stages)


class WorkerCalls:
    """Call the methods of EmoWorkerExtension on every rank.

    `rpc` is `AsyncLLM.collective_rpc` as (method, args) -> one reply per rank. `is_dead` tells
    whether the engine has died, so that no reply can come. `check_experts` raises CheckpointError
    for a (layer, expert) whose files have changed. During a load, `on_copied` is called with the
    number of copies done and the number of all copies. `on_streamed` is called with the experts
    that were streamed since its last call, and the seconds that steps waited for them. Every method
    that calls the workers raises EngineDead for a dead engine, and for a reply that is not ok or
    not valid.
    """

    def __init__(
        self,
        rpc: Callable[[str, tuple[Any, ...]], Awaitable[Sequence[_Reply]]],
        is_dead: Callable[[], bool],
        check_experts: Callable[[Iterable[tuple[int, int]]], None],
        on_copied: Callable[[int, int], None] = lambda done, total: None,
        on_streamed: Callable[[int, float], None] = lambda experts, seconds: None,
    ) -> None:
        self._rpc = rpc
        self._is_dead = is_dead
        self._check_experts = check_experts
        self._on_copied = on_copied
        self._on_streamed = on_streamed
        self._streamed, self._stream_seconds = 0, 0.0
        self._call_ids = itertools.count(1)
        self._load_ids = itertools.count(1)
        self._calls: set[asyncio.Future[Sequence[_Reply]]] = set()  # asyncio keeps weak references

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Raise PoolLoadFailed unless these experts' files are there, whole and of the right shape.

        Reads no weights and calls no worker, so it can run before anything is evicted for a load.
        """
        try:
            self._check_experts((copy.layer, copy.expert) for copy in copies)
        except CheckpointError as error:
            raise PoolLoadFailed(str(error)) from error

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Copy experts into slots beside decoding, then give them a row of the pool table.

        `expert_ids` has one tuple per layer. Returns when every rank has published the pool. Raises
        PoolLoadFailed if a rank failed, but only after all ranks have stopped copying.
        """
        start = time.monotonic()
        table_row = (row, [list(ids) for ids in expert_ids], temperature)
        num_experts = sum(map(len, expert_ids))
        if not copies:
            await self._call("emo_publish_pool", *table_row)
            return LoadReport(num_experts, 0, 0, 0, 0, time.monotonic() - start)
        load_id = next(self._load_ids)
        rows = [[copy.layer, copy.expert, copy.slot] for copy in copies]
        await self._call("emo_start_load", load_id, rows)
        ranks = await self._settled(load_id, table_row, len(copies))
        failures = [str(rank.failure) for rank in ranks if rank.state == "failed"]
        if failures:
            raise PoolLoadFailed(failures[0])
        return LoadReport(
            num_experts=num_experts,
            experts_copied=len(copies),
            bytes_copied=sum(rank.bytes_copied for rank in ranks),
            bytes_read=sum(rank.bytes_read for rank in ranks),
            host_hits=sum(min(rank.host_hits for rank in stage) for stage in _by_stage(ranks)),
            seconds=time.monotonic() - start,
        )

    async def describe(self) -> EngineFacts:
        """Ask the workers what they hold."""
        ranks = await self._ask(EngineDescription, "emo_describe")
        stages = _by_stage(ranks)
        return EngineFacts(
            num_ranks=len(ranks),
            num_stages=len(stages),
            trunk_bytes=max(rank.trunk_bytes for rank in ranks),
            slab_bytes=max(rank.slab_bytes for rank in ranks),
            slot_bytes=max(rank.slot_bytes for rank in ranks),
            num_slots=tuple(slots for stage in stages for slots in stage[0].num_slots),
            kv_cache_bytes=max(rank.kv_cache_bytes for rank in ranks),
            dtype=ranks[0].dtype,
            expert_dtype=ranks[0].expert_dtype,
            moe_backend=ranks[0].moe_backend,
            routes_by_pool=all(rank.routes_by_pool for rank in ranks),
            records_routing=any(rank.records_routing for rank in ranks),
        )

    # Routers are equal on all ranks of a stage, so only its first rank records.

    async def read_coverage(self) -> dict[int, CoverageSum]:
        """Return the coverage of each account since the last call."""
        ranks = await self._ask(CoverageReading, "emo_read_coverage")
        self._note_streamed(ranks)
        num_layers = max(1, sum(rank.num_layers for rank in ranks))
        found: dict[int, CoverageSum] = {}
        for rank in ranks:
            for account, mass, tokens in rank.coverage:
                before = found.get(account, CoverageSum(0.0, 0))
                mass = before.mass + mass * rank.num_layers / num_layers
                found[account] = CoverageSum(mass, max(before.tokens, tokens))
        return found

    def _note_streamed(self, ranks: Sequence[CoverageReading]) -> None:
        """Pass on what was streamed since the last reading."""
        experts = sum(rank.streamed_experts for rank in ranks)
        seconds = sum(rank.stream_seconds for rank in ranks)
        if experts > self._streamed:
            self._on_streamed(experts - self._streamed, seconds - self._stream_seconds)
            self._streamed, self._stream_seconds = experts, seconds

    async def read_mass(self, slot: int) -> RouterMass:
        """Return the router's mass in a mass slot, and empty the slot."""
        ranks = await self._ask(RouterMass, "emo_read_mass", slot)
        return RouterMass(
            max(rank.tokens for rank in ranks), _of_all_stages([rank.layers for rank in ranks])
        )

    async def usage_of(self, pool: ExpertPool) -> PoolUsage:
        """Return how often pools of this content chose each expert since the engine started."""
        ids = [list(layer) for layer in pool.expert_ids]
        ranks = await self._ask(PoolUsage, "emo_usage", ids, pool.router_temperature)
        return PoolUsage(
            max(rank.tokens for rank in ranks), _of_all_stages([rank.counts for rank in ranks])
        )

    async def _settled(
        self, load_id: int, table_row: tuple[int, list[list[int]], float], total: int
    ) -> list[LoadProgress]:
        """Poll until no rank is copying; each rank publishes in the first poll that finds it done.

        It does no harm if only some ranks have published a row: no request uses it yet.
        """
        start, pause = time.monotonic(), _SHORTEST_PAUSE_SECONDS
        while True:
            await asyncio.sleep(pause)
            ranks = await self._ask(LoadProgress, "emo_finish_load", load_id, *table_row)
            done = sum(min(rank.experts_copied for rank in stage) for stage in _by_stage(ranks))
            self._on_copied(done, total)
            if all(rank.state != "loading" for rank in ranks):
                return ranks
            pause = _next_pause(time.monotonic() - start, done, total)

    async def _ask(self, record: type[_Record], method: str, *args: Any) -> list[_Record]:
        """Make a call and return one validated record per rank."""
        replies = await self._call(method, *args)
        try:
            return [_READERS[record].validate_python(reply) for reply in replies]
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, found['loc']))} is {found['input']!r:.80}: {found['msg']}"
                for found in error.errors()
            )
            raise EngineDead(
                f"{method}: a reply is not a valid {record.__name__}: {wrong}"
            ) from error

    async def _call(self, method: str, *args: Any) -> Sequence[_Reply]:
        call_id = next(self._call_ids)
        call = asyncio.ensure_future(self._rpc(method, (call_id, *args)))
        self._calls.add(call)
        call.add_done_callback(self._forget)
        while not call.done():
            if self._is_dead():
                call.cancel()
                raise EngineDead(f"the engine process died during {method}")
            await asyncio.wait((call,), timeout=_DEATH_CHECK_SECONDS)
        replies = call.result()
        for rank, reply in enumerate(replies):
            if reply.get("call_id") != call_id:
                raise EngineDead(
                    f"{method}: rank {rank} answered call {reply.get('call_id')}, not {call_id}"
                )
            if not reply.get("ok"):
                raise EngineDead(f"{method} failed on rank {rank}: {reply.get('error')}")
        return replies

    def _forget(self, call: asyncio.Future[Sequence[_Reply]]) -> None:
        """Drop a finished call; if its caller is gone, asyncio would complain about its error."""
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()


def _by_stage(ranks: Sequence[_Staged]) -> list[list[_Staged]]:
    """Return the ranks of each stage of the pipeline, in order."""
    stages: dict[int, list[_Staged]] = {}
    for rank in ranks:
        stages.setdefault(rank.stage, []).append(rank)
    return [stages[number] for number in sorted(stages)]


def _of_all_stages(ranks: Sequence[_PerLayer[_Number]]) -> _PerLayer[_Number]:
    """Return each layer's numbers from the rank that has them, empty for a dense layer."""
    return tuple(next(filter(None, layer), ()) for layer in zip(*ranks, strict=True))


def _next_pause(seconds: float, done: int, total: int) -> float:
    """Return the seconds before the next poll, after `done` of `total` copies in `seconds`."""
    remaining = seconds * (total - done) / max(done, 1)
    most = min(_LONGEST_PAUSE_SECONDS, _MOST_GROWTH * seconds)
    return max(_SHORTEST_PAUSE_SECONDS, min(remaining, most))
