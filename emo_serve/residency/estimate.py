"""When a refused request should come back: leases that must end first, and loads in turn.

Leases end as recent ones did; before any has ended, one is expected to run as long again. A pool in
the queue costs a load, and the time of the leases in its way if pools are closed to make room.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator

from emo_serve.residency.loads import RunningLoads
from emo_serve.residency.pending import PendingPools
from emo_serve.residency.resident import ResidentPools

__all__ = ["LeaseTimes", "WaitEstimate"]

_REMEMBERED = 64  # leases; enough for a quantile, and they are of late
_QUANTILE = 0.9
_MAX_SECONDS = 300.0


class LeaseTimes:
    """Note when leases begin and end, and estimate how long the running ones will last."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ids = itertools.count()
        self._running: dict[str, dict[int, float]] = {}  # by pool, the oldest first
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    def begin(self, key: str) -> int:
        """Note a lease of a pool, and return its number."""
        number = next(self._ids)
        self._running.setdefault(key, {})[number] = self._clock()
        return number

    def end(self, key: str, number: int, *, is_finished: bool) -> None:
        """Note the end of a lease; one that was cut short says nothing about others."""
        start = self._running[key].pop(number)
        if not self._running[key]:
            del self._running[key]
        if is_finished:
            self._recent.append(self._clock() - start)

    def typical(self) -> float:
        """Return how long most leases last; 0 while nothing is known."""
        if self._recent:
            return self._remaining(0.0)
        return max((self._age(key)[0] for key in self._running), default=0.0)

    def remaining(self, key: str) -> float:
        """Return the seconds until a pool's last lease should end; 0 if it has none."""
        if key not in self._running:
            return 0.0
        return max(map(self._remaining, self._age(key)))

    def _age(self, key: str) -> tuple[float, float]:
        """Return the ages of a pool's oldest and newest lease."""
        now, starts = self._clock(), self._running[key].values()
        return now - next(iter(starts)), now - next(reversed(starts))

    def _remaining(self, age: float) -> float:
        longer = sorted(seconds for seconds in self._recent if seconds > age)
        return longer[int(_QUANTILE * (len(longer) - 1))] - age if longer else age


class WaitEstimate:
    """Estimate the Retry-After of requests that cannot wait, or have waited in vain."""

    def __init__(
        self,
        resident: ResidentPools,
        pending: PendingPools,
        loads: RunningLoads,
        times: LeaseTimes,
        clock: Callable[[], float],
    ) -> None:
        self._resident, self._pending, self._loads = resident, pending, loads
        self._times, self._clock = times, clock
        self._promised: deque[float] = deque()  # when clients were told to come back

    def until_served(self, key: str) -> int:
        """Return the seconds until a pool should be resident, in its place or at the end."""
        last = 0.0
        for pending_key, _, seconds in self._turns():
            if pending_key == key:
                return _whole(seconds)
            last = seconds
        return _whole(last + self._one_turn() if last else self._loads.last_seconds)

    def until_place(self) -> int:
        """Return the seconds until the queue of now is served.

        A place is free before that, but others come for it too. Once as many clients were sent away
        as wait, further ones are sent behind them.
        """
        now = self._clock()
        while self._promised and self._promised[0] <= now:
            self._promised.popleft()
        freed, last = 0, 0.0
        for _, num_waiting, seconds in self._turns():
            freed, last = freed + num_waiting, seconds
        if freed <= len(self._promised):
            rounds = (len(self._promised) - freed) // max(1, freed) + 1
            last += rounds * max(last, self._one_turn())
        if last < _MAX_SECONDS:
            self._promised.append(max([now + last, *list(self._promised)[-1:]]))
        return _whole(last)

    def _turns(self) -> Iterator[tuple[str, int, float]]:
        """Yield each waiting pool's key, its waiters, and the seconds until they are let in."""
        load = self._loads.last_seconds
        seconds = load if self._loads.is_copying else 0.0
        is_first = True
        for pending in self._pending:
            if pending.is_growth:  # it comes after all of these
                continue
            resident = self._resident.get(pending.key)
            if resident is None or resident.is_published:  # it is not being loaded yet
                seconds = (
                    self._room_seconds(seconds) + load if is_first else (seconds + self._one_turn())
                )
                is_first = False
            yield pending.key, pending.num_clients, seconds

    def _room_seconds(self, seconds: float) -> float:
        """Return when the leases have ended that the first pool must wait for, and the link."""
        closing = (one.key for one in self._resident if one.is_closing)
        return max([seconds, *map(self._times.remaining, closing)])

    def _one_turn(self) -> float:
        """Return what one more pool costs: a load, and leases if pools are closed for others."""
        is_contended = any(one.is_closing for one in self._resident)
        return self._loads.last_seconds + (self._times.typical() if is_contended else 0.0)


def _whole(seconds: float) -> int:
    return math.ceil(max(1.0, min(seconds, _MAX_SECONDS)))
