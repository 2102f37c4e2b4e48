"""How many replicas a fleet should have, by what matters here: work, waits for loads, and hits.

Requests per replica, the usual measure, miss what pools add: a fleet may have engines to spare and
yet too few slots, so that requests wait for loads. So two wants are taken together:

- for work: as many replicas as keep each at `target_share` of what it runs at once;
- for slots: a quarter more than now (at least one) while more than `waiting_share` of all requests
  wait for loads, or fewer than `low_hits` find their pool. An eighth less (at least one), and no
  less, while hardly any wait and more than `high_hits` find their pool: what the last replicas have
  must find a place on the others.

Loads come in bursts, so growth is decided by the mean over `up_seconds`, and those begin anew when
the number of replicas has changed: a new replica has nothing resident, and its first loads are no
reason for one more. While replicas that were asked for do not serve yet, no more are asked for; if
they find no place, they are given up once nothing has wanted them for `down_seconds`. A want to
shrink must last as long. A fleet that has `max_replicas` and
still waits for loads needs more slots per replica, which no autoscaler can give.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from emo_serve.errors import ConfigError

__all__ = ["Autoscaler", "ReplicaReport", "ScalingLimits"]

_GROWTH, _SHRINKING = 1.25, 0.875


@dataclass(frozen=True)
class ReplicaReport:
    """One replica over the last interval: requests on average, and how pools were found.

    `running` counts requests that hold a lease, those queued in the engine included, and
    `waiting_for_loads` those that wait for one. Of `hits` and `misses` only the share counts, so
    they may be means, too.
    """

    running: float
    waiting_for_loads: float
    hits: float
    misses: float


@dataclass(frozen=True)
class ScalingLimits:
    """When to grow and to shrink; `concurrency` is what a replica runs at once with no queue."""

    min_replicas: int
    max_replicas: int
    concurrency: int
    target_share: float = 0.6
    waiting_share: float = 0.1
    low_hits: float = 0.8
    high_hits: float = 0.95
    up_seconds: float = 30.0
    down_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"replicas from {self.min_replicas} to {self.max_replicas}; expected at least 1,"
                " and the maximum no smaller"
            )
        if self.concurrency < 1:
            raise ConfigError(f"concurrency is {self.concurrency}; expected at least 1")
        for name in ("target_share", "waiting_share", "low_hits", "high_hits"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected above 0, at most 1")


class Autoscaler:
    """Decide at every report how many replicas there should be."""

    def __init__(self, limits: ScalingLimits) -> None:
        self.limits = limits
        self._current = 0
        self._start: float | None = None
        self._changed_at = 0.0
        self._seen: deque[tuple[float, ReplicaReport]] = deque()  # sums over replicas
        self._wants: deque[tuple[float, int]] = deque()

    def decide(self, reports: Sequence[ReplicaReport], now: float, asked: int = 0) -> int:
        """Return the number of replicas; `reports` has one for each that serves now.

        `asked` is the number that was asked for, if some of these do not serve yet.
        """
        limits, current = self.limits, len(reports)
        if self._start is None:
            self._start = now
        if current != self._current:
            self._current, self._changed_at = current, now
            self._seen.clear()
        self._seen.append((now, _sum([(now, report) for report in reports])))
        _trim(self._seen, now - limits.up_seconds)
        want = self._want(current)
        self._wants.append((now, want))
        _trim(self._wants, now - limits.down_seconds)
        target = current
        most_wanted = max(want for _, want in self._wants)
        if asked > current:
            target = max(current, min(asked, most_wanted))
        elif want > current and now - self._changed_at >= limits.up_seconds:
            target = want
        elif now - self._start >= limits.down_seconds:
            target = min(current, most_wanted)
        return min(max(target, limits.min_replicas), limits.max_replicas)

    def _want(self, current: int) -> int:
        """Return what the last seconds ask for, whatever the limits of the fleet."""
        limits, seen = self.limits, _sum(self._seen)
        requests = seen.running + seen.waiting_for_loads
        per_replica = limits.concurrency * limits.target_share * len(self._seen)
        for_work = math.ceil(requests / per_replica)
        waiting = seen.waiting_for_loads / requests if requests else 0.0
        asked = seen.hits + seen.misses
        hits = seen.hits / asked if asked else 1.0
        if waiting > limits.waiting_share or hits < limits.low_hits:
            return max(for_work, current + 1, math.ceil(current * _GROWTH))
        if waiting <= limits.waiting_share / 2 and hits > limits.high_hits:
            return max(for_work, min(current - 1, math.ceil(current * _SHRINKING)))
        return max(for_work, current)


def _sum(reports: Iterable[tuple[float, ReplicaReport]]) -> ReplicaReport:
    summed = [one for _, one in reports]
    return ReplicaReport(
        sum(one.running for one in summed),
        sum(one.waiting_for_loads for one in summed),
        sum(one.hits for one in summed),
        sum(one.misses for one in summed),
    )


def _trim(timed: deque[Any], before: float) -> None:
    while timed[0][0] < before:
        timed.popleft()
