"""The calls into the engine's workers: numbered, checked on every rank, never left hanging.

`WorkerCalls` is the residency manager's PoolEngine over vLLM's `collective_rpc`. That call gives no
answer when the engine process dies and must not be given a timeout (a late reply would be taken for
the next call's), so each one is raced with the engine's error state. Workers answer with a record
instead of raising; one bad record of any rank fails the call.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emo_serve.errors import EngineDead
from emo_serve.residency.manager import LoadReport
from emo_serve.residency.slots import Copy, ExpertIds

__all__ = ["EngineFacts", "WorkerCalls"]

_Reply = Mapping[str, Any]
_POLL_SECONDS = 0.5
_COPIES_PER_CALL = 64  # a call blocks the engine's steps, and progress is seen between two


@dataclass(frozen=True)
class EngineFacts:
    """What the workers hold; bytes are of one rank, the largest, unless they say otherwise."""

    num_ranks: int
    trunk_bytes: int
    slab_bytes: int
    slot_bytes: int
    num_slots: tuple[int, ...]
    dtype: str
    moe_backend: str
    routes_by_pool: bool

    @property
    def slot_bytes_all_ranks(self) -> int:
        """Return what one expert of one layer takes on all devices together."""
        return self.slot_bytes * self.num_ranks


class WorkerCalls:
    """Call the methods of EmoWorkerExtension on every rank.

    `rpc` is `AsyncLLM.collective_rpc` as (method, args) -> one reply a rank; `is_dead` tells that
    no reply can come any more; `on_copied` hears, after each part of a load, how many copies are
    done and how many there are. Raises EngineDead for a dead engine and a reply that is not ok.
    """

    def __init__(
        self,
        rpc: Callable[[str, tuple[Any, ...]], Awaitable[Sequence[_Reply]]],
        is_dead: Callable[[], bool],
        on_copied: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._rpc = rpc
        self._is_dead = is_dead
        self._on_copied = on_copied
        self._call_ids = itertools.count(1)
        self._calls: set[asyncio.Future[Sequence[_Reply]]] = set()  # asyncio keeps weak references

    async def load_experts(self, copies: Sequence[Copy]) -> LoadReport:
        """Copy experts into slots, part by part."""
        bytes_read, seconds = 0, 0.0
        for start in range(0, len(copies), _COPIES_PER_CALL):
            part = copies[start : start + _COPIES_PER_CALL]
            rows = [[copy.layer, copy.expert, copy.slot] for copy in part]
            replies = await self._call("emo_load_experts", rows)
            bytes_read += max(reply["bytes_read"] for reply in replies)
            seconds += max(reply["seconds"] for reply in replies)
            self._on_copied(start + len(part), len(copies))
        return LoadReport(bytes_read, seconds)

    async def publish_pool(self, row: int, expert_ids: ExpertIds, temperature: float) -> None:
        """Make one row of the pool table stand for these experts."""
        await self._call("emo_publish_pool", row, [list(ids) for ids in expert_ids], temperature)

    async def describe(self) -> EngineFacts:
        """Ask what the workers hold."""
        replies = await self._call("emo_describe")
        first = replies[0]
        return EngineFacts(
            num_ranks=len(replies),
            trunk_bytes=max(reply["trunk_bytes"] for reply in replies),
            slab_bytes=max(reply["slab_bytes"] for reply in replies),
            slot_bytes=max(reply["slot_bytes"] for reply in replies),
            num_slots=tuple(first["num_slots"]),
            dtype=first["dtype"],
            moe_backend=first["moe_backend"],
            routes_by_pool=all(reply["routes_by_pool"] for reply in replies),
        )

    async def _call(self, method: str, *args: Any) -> Sequence[_Reply]:
        call_id = next(self._call_ids)
        call = asyncio.ensure_future(self._rpc(method, (call_id, *args)))
        self._calls.add(call)
        call.add_done_callback(self._forget)
        while not call.done():
            if self._is_dead():
                call.cancel()
                raise EngineDead(f"the engine process died during {method}")
            await asyncio.wait((call,), timeout=_POLL_SECONDS)
        replies = call.result()
        for rank, reply in enumerate(replies):
            if reply.get("call_id") != call_id:
                raise EngineDead(f"{method}: rank {rank} answered call {reply.get('call_id')}")
            if not reply.get("ok"):
                raise EngineDead(f"{method} failed on rank {rank}: {reply.get('error')}")
        return replies

    def _forget(self, call: asyncio.Future[Sequence[_Reply]]) -> None:
        """Drop a finished call, whose caller may have gone, without a complaint from asyncio."""
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()
