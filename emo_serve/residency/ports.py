"""What residency needs from outside: an engine that copies, and an observer that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from emo_serve.residency.slots import Copy, ExpertIds

__all__ = ["LoadReport", "NullObserver", "PoolEngine", "ResidencyObserver"]


@dataclass(frozen=True)
class LoadReport:
    """What one load of a pool took, for the queue, the logs and the metrics alike.

    Of the pool's `num_experts`, `experts_copied` were missing from the slab; of those, `host_hits`
    were in host memory, on the rank that found fewest, and the others were read from disk. Bytes
    are those of all ranks together; `seconds` run from the first call to publication.
    """

    num_experts: int
    experts_copied: int
    host_hits: int
    bytes_copied: int
    bytes_read: int
    seconds: float

    @property
    def slab_hits(self) -> int:
        """Return the experts that were in slots already."""
        return self.num_experts - self.experts_copied

    @property
    def disk_reads(self) -> int:
        """Return the experts that were read from disk."""
        return self.experts_copied - self.host_hits


class PoolEngine(Protocol):
    """What the manager asks of the engine's workers; the waiting requests get what they raise."""

    def check_readable(self, copies: Sequence[Copy]) -> None:
        """Raise PoolLoadFailed unless the files of these experts exist and are complete.

        Must be quick and copy nothing; called before anything is evicted for a load, and before
        each request of a pool that is streamed.
        """
        ...

    async def make_resident(
        self, row: int, expert_ids: ExpertIds, temperature: float, copies: Sequence[Copy]
    ) -> LoadReport:
        """Copy experts into slots beside decoding, then publish the pool's row in every rank.

        No published row refers to those slots. When this raises, no copy is still running.
        """
        ...


class ResidencyObserver(Protocol):
    """Count what happens to pools, by name; called between two awaits, so it must be quick."""

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Count a client's request; a hit needs neither a copy nor a wait in the queue."""
        ...

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Count a client's wait that ended; `outcome` is granted, deadline, failed or left."""
        ...

    def count_load(self, pool: str, report: LoadReport) -> None:
        """Count a load that copied experts and published its pool."""
        ...

    def count_failed_load(self, pool: str) -> None:
        """Count a load that failed, or could not begin; what it copied is not known."""
        ...

    def count_smaller(self, pool: str) -> None:
        """Count a client's request that a smaller size serves, since the pool is not resident."""
        ...

    def count_eviction(self, pool: str, reason: str) -> None:
        """Count an eviction; `reason` is room, shrunk, operator or retired."""
        ...


class NullObserver:
    """A ResidencyObserver that does nothing."""

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Do nothing."""

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Do nothing."""

    def count_load(self, pool: str, report: LoadReport) -> None:
        """Do nothing."""

    def count_failed_load(self, pool: str) -> None:
        """Do nothing."""

    def count_smaller(self, pool: str) -> None:
        """Do nothing."""

    def count_eviction(self, pool: str, reason: str) -> None:
        """Do nothing."""
