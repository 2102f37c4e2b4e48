"""What clients have asked of each pool since the start: hits, misses, coverage, the last request.

An observer between the residency manager and the metrics: it keeps, by the name that was asked for,
what a list of pools shows, and passes everything on. Metrics count the same, but all unions under
one label, and cannot be read back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from emo_serve.residency.ports import LoadReport, ResidencyObserver

__all__ = ["PoolActivity", "PoolUse"]

_MAX_NAMES = 4096
"""Names kept, those asked for last; unions have any number of names."""


@dataclass
class PoolUse:
    """What clients have asked of one name.

    `last_used` is in whole seconds of Unix time, None before the first request. `coverage_sum` adds
    up the shares of `covered_requests` requests.
    """

    hits: int = 0
    misses: int = 0
    last_used: int | None = None
    coverage_sum: float = 0.0
    covered_requests: int = 0

    @property
    def coverage(self) -> float | None:
        """Return the mean coverage of the requests; None if none has ended."""
        return self.coverage_sum / self.covered_requests if self.covered_requests else None


class PoolActivity:
    """A ResidencyObserver that remembers requests by name, and passes everything on.

    `version` grows with everything that is remembered.
    """

    def __init__(self, observer: ResidencyObserver, clock: Callable[[], float] = time.time) -> None:
        self._observer, self._clock = observer, clock
        self._uses: LRUCache[str, PoolUse] = LRUCache(_MAX_NAMES)
        self.version = 0

    def use_of(self, pool: str) -> PoolUse:
        """Return what clients have asked of a name, which may be a union."""
        return self._uses.get(pool) or PoolUse()

    def add_coverage(self, pool: str, share: float) -> None:
        """Remember one engine request's coverage, from 0 to 1."""
        use = self._known(pool)
        use.coverage_sum += share
        use.covered_requests += 1

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        """Remember a client's request."""
        use = self._known(pool)
        use.hits += is_hit
        use.misses += not is_hit
        use.last_used = int(self._clock())
        self._observer.count_ask(pool, is_hit=is_hit)

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        """Pass on the end of a wait."""
        self._observer.count_wait(pool, outcome, seconds)

    def count_load(self, pool: str, report: LoadReport) -> None:
        """Pass on a load that copied experts."""
        self._observer.count_load(pool, report)

    def count_failed_load(self, pool: str) -> None:
        """Pass on a failed load."""
        self._observer.count_failed_load(pool)

    def count_smaller(self, pool: str) -> None:
        """Pass on a request that a smaller size serves."""
        self._observer.count_smaller(pool)

    def count_eviction(self, pool: str, reason: str) -> None:
        """Pass on an eviction."""
        self._observer.count_eviction(pool, reason)

    def _known(self, pool: str) -> PoolUse:
        self.version += 1
        if (use := self._uses.get(pool)) is None:
            use = self._uses[pool] = PoolUse()
        return use
