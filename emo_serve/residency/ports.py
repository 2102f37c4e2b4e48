"""What residency asks of the world around it: an engine that copies, and somebody who counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from emo_serve.residency.slots import Copy, ExpertIds

__all__ = ["LoadReport", "NobodyCounts", "PoolEngine", "ResidencyObserver"]


@dataclass(frozen=True)
class LoadReport:
    """What one load took. Bytes are those of all ranks together.

    `host_hits` counts experts found in host memory, on the rank that found fewest; `seconds` run
    from the first call to publication.
    """

    experts_copied: int = 0
    bytes_copied: int = 0
    bytes_read: int = 0
    host_hits: int = 0
    seconds: float = 0.0


class PoolEngine(Protocol):
    """What the manager asks of the engine's workers; whatever these raise reaches the requests."""

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Raise PoolLoadFailed unless the files of these experts are there and whole.

        Quick, copies nothing; asked before anything is evicted for a load.
        """
        ...

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Copy experts into slots beside decoding, then publish the pool's row in every rank.

        No published row refers to those slots. When this raises, no copy is under way any more.
        """
        ...


class ResidencyObserver(Protocol):
    """Hear what happens to pools, by name; called between two awaits, so it must be quick."""

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Count a request; a hit needs no copy and no wait in the queue."""
        ...

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Count the end of a wait: granted, deadline, failed or left."""
        ...

    def count_load(
        self,
        pool: str,
        outcome: str,
        *,
        slab_hits: int,
        host_hits: int,
        disk_reads: int,
        bytes_copied: int,
        bytes_read: int,
        seconds: float,
    ) -> None:
        """Count a load that copied experts, by where they were: `outcome` is loaded or failed."""
        ...

    def count_eviction(self, pool: str, reason: str) -> None:
        """Count an eviction: for room, by an operator, or of a retired definition."""
        ...


class NobodyCounts:
    """A ResidencyObserver that does nothing."""

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Do nothing."""

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Do nothing."""

    def count_load(
        self,
        pool: str,
        outcome: str,
        *,
        slab_hits: int,
        host_hits: int,
        disk_reads: int,
        bytes_copied: int,
        bytes_read: int,
        seconds: float,
    ) -> None:
        """Do nothing."""

    def count_eviction(self, pool: str, reason: str) -> None:
        """Do nothing."""
