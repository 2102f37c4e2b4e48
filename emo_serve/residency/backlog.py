"""The bound on admitted work: running and queued sequences, shared fairly among pools.

A sequence is one completion; an engine request has `n` of them. Up to `max_running` sequences the
engine computes at once, further ones queue in the engine or wait for their pool. Each admitted
request holds a `Place` from the check until its end, so nothing slips in between.

- Work that the engine can begin at once is always admitted.
- A pool that has no admitted request may always have one, whatever the others have queued.
- Beyond that a pool may hold its share of `max_running` and _SHARE times what is free of the queue.
  Alone it can fill 4/5 of the queue. With k pools each can have 4/(1 + 4k) of it, so a newcomer
  finds room and the queue's length is bounded. These are the dynamic thresholds of shared-memory
  switches (Choudhury and Hahne, 1998).

So at most `max_running + max_queued` sequences are admitted, plus one request for each further
pool. A refused request is told when its turn should come: after the sequences promised to earlier
refused requests, at the measured rate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from emo_serve.errors import TooManyQueued
from emo_serve.pools.pool import ExpertPool

__all__ = ["Backlog", "BacklogLimits", "Place"]

_SHARE = 4
_MARGIN = 1.25  # a client that comes back a little late finds room; the queue is still not empty
_MAX_RETRY_SECONDS = 300.0
_SOON = 1e-6  # seconds; only keeps a rate finite
_MEMORY_SECONDS = 20.0  # the rate is that of about this much recent work


@dataclass(frozen=True)
class BacklogLimits:
    """Sequences that the engine can run at once, and how many more may be admitted."""

    max_running: int
    max_queued: int

    @property
    def max_admitted(self) -> int:
        """Return how many sequences may be admitted in all."""
        return self.max_running + self.max_queued

    @property
    def max_alone(self) -> int:
        """Return how many sequences one pool may have while no other has any."""
        return self.max_running + self.max_queued * _SHARE // (1 + _SHARE)


class Place:
    """An admitted request's part of the bound; give it back exactly when the request has ended."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the place back; calling it again changes nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            release()


class Backlog:
    """Count admitted sequences by pool and refuse what is too many; without limits, count only."""

    def __init__(self, limits: BacklogLimits | None, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._held: dict[str, int] = {}  # by content hash; no zeros
        self._total = 0
        self._rate = _Rate(clock, math.inf if limits is None else limits.max_running)
        self._promises: dict[str, _Promises] = {}
        self._clock = clock

    @property
    def num_admitted(self) -> int:
        """Return the admitted sequences of all pools."""
        return self._total

    @property
    def limits(self) -> BacklogLimits | None:
        """Return the limits; None if there are none."""
        return self._limits

    def enter(
        self, pool: ExpertPool, num_sequences: int = 1, *, is_continued: bool = False
    ) -> Place:
        """Admit a request and return its place; raises TooManyQueued.

        A continued request, e.g. the next step of a beam search, is counted but never refused: what
        was admitted is served to its end.
        """
        key = pool.content_hash
        if not (is_continued or self._has_room(key, num_sequences)):
            raise self._refusal(pool, num_sequences)
        self._rate.note(self._total)
        self._total += num_sequences
        self._held[key] = self._held.get(key, 0) + num_sequences
        return Place(lambda: self._leave(key, num_sequences))

    def check_integrity(self) -> None:
        """Assert that the counts agree."""
        assert self._total == sum(self._held.values())
        assert all(held > 0 for held in self._held.values())

    def _leave(self, key: str, num_sequences: int) -> None:
        self._rate.note(self._total, ended=num_sequences)
        self._total -= num_sequences
        self._held[key] -= num_sequences
        if not self._held[key]:
            del self._held[key]
            self._promises.pop(key, None)

    def _has_room(self, key: str, num_sequences: int) -> bool:
        limits, held = self._limits, self._held.get(key, 0)
        if limits is None or not held or self._total + num_sequences <= limits.max_running:
            return True
        free = limits.max_admitted - self._total
        share = limits.max_running // len(self._held) + _SHARE * free
        return num_sequences <= free and held + num_sequences <= share

    def _refusal(self, pool: ExpertPool, num_sequences: int) -> TooManyQueued:
        assert self._limits is not None
        held = self._held[pool.content_hash]
        return TooManyQueued(
            f"too many requests are queued: {held} of pool {pool.name!r} and"
            f" {self._total - held} of other pools run or wait; the engine runs"
            f" {self._limits.max_running} at once and {self._limits.max_queued} more may be queued,"
            " shared among pools (--max-queued); retry later, or raise --max-queued",
            self._retry_after_seconds(pool.content_hash, num_sequences),
        )

    def _retry_after_seconds(self, key: str, num_sequences: int) -> int:
        """Say when as many of the pool's sequences should have ended as are needed."""
        promises = self._promises.setdefault(key, _Promises())
        now = self._clock()
        needed = promises.outstanding(now) + num_sequences
        # Of what ends, a pool is given between what it has of the places and its equal share.
        share = (self._held[key] / self._total + 1 / len(self._held)) / 2
        seconds = _MARGIN * needed / (share * self._rate.per_second(self._total))
        if seconds < _MAX_RETRY_SECONDS:
            promises.add(now + seconds, num_sequences)
        return math.ceil(max(1.0, min(seconds, _MAX_RETRY_SECONDS)))


class _Promises:
    """Sequences for which refused clients were told to come back, until the time they were told."""

    def __init__(self) -> None:
        self._due: deque[tuple[float, int]] = deque()  # in order of time
        self._outstanding = 0

    def outstanding(self, now: float) -> int:
        while self._due and self._due[0][0] <= now:
            self._outstanding -= self._due.popleft()[1]
        return self._outstanding

    def add(self, due: float, num_sequences: int) -> None:
        if self._due:
            due = max(due, self._due[-1][0])
        self._due.append((due, num_sequences))
        self._outstanding += num_sequences


class _Rate:
    """Sequences ended per second: those ended per second that one was running, times the running.

    Both sums fade with time. Measured so, the rate of a full batch is right, and that of an idle
    server is not taken for all it can do.
    """

    def __init__(self, clock: Callable[[], float], max_running: float) -> None:
        self._clock, self._max_running = clock, max_running
        self._since = clock()
        self._busy = 0.0  # sequence-seconds of running
        self._ended = 0.0

    def note(self, total: int, *, ended: int = 0) -> None:
        """Add the time since the last note, in which `total` sequences were admitted."""
        now = self._clock()
        elapsed, self._since = now - self._since, now
        if total:  # an idle server forgets nothing
            keep = math.exp(-elapsed / _MEMORY_SECONDS)
            self._busy = self._busy * keep + elapsed * min(total, self._max_running)
            self._ended *= keep
        self._ended += ended

    def per_second(self, total: int) -> float:
        """Return the rate with `total` sequences admitted, at least 1."""
        self.note(total)
        running = min(total, self._max_running)
        if not self._ended:  # what runs is expected to run as long again, but a second at least
            return running * running / max(self._busy, running)
        return running * self._ended / max(self._busy, _SOON)
