"""Where a router has sent a pool's requests lately: what replicas do not tell yet."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["RecentlySent"]

_REMEMBERED = 8192  # pairs; unions make their number the clients' choice


class RecentlySent:
    """Remember pairs of pool and replica for some seconds; the oldest make room for new ones."""

    def __init__(self, memory_seconds: float) -> None:
        self._memory_seconds = memory_seconds
        self._sent_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, pool: str, replica: str, now: float) -> None:
        """Remember that a request for the pool went to the replica."""
        self._sent_at[pool, replica] = now
        self._sent_at.move_to_end((pool, replica))
        if len(self._sent_at) > _REMEMBERED:
            self._sent_at.popitem(last=False)

    def has(self, pool: str, replica: str, now: float) -> bool:
        """Tell whether such a request went there less than the memory ago."""
        sent_at = self._sent_at.get((pool, replica))
        return sent_at is not None and now - sent_at < self._memory_seconds
