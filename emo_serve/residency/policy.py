"""Which pools are given up first when another needs their slots.

A policy only orders: which pools may be evicted at all (not leased, not pinned, not loading) and
how many must go is the manager's business. It hears of every request, hits and misses alike, and
knows pools by an opaque key. Unions make the number of keys the clients' choice, so each policy
remembers at most `REMEMBERED_KEYS` of them and forgets the longest not asked for; a key it does not
remember is colder than any that it does.

Time comes with each call, in seconds of one clock that never goes back.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import Protocol

from emo_serve.errors import ConfigError

__all__ = [
    "POLICIES",
    "REMEMBERED_KEYS",
    "EvictionPolicy",
    "LfuPolicy",
    "LruPolicy",
    "PinnedFirstPolicy",
    "make_policy",
]

POLICIES = ("lfu", "lru", "pinned-first")
"""What `make_policy` knows, the default first: it came closest to the optimum."""

REMEMBERED_KEYS = 4096


class EvictionPolicy(Protocol):
    """Order pools from the first to evict to the last."""

    name: str

    def note_asked(self, key: str, now: float) -> None:
        """Hear that a request for the pool came, whether it was resident or not."""
        ...

    def coldest_first(self, keys: Collection[str], now: float) -> list[str]:
        """Return all of `keys`, the first to evict first; equal ones in order of key.

        A question: asking it changes no later answer. It may name keys never asked for.
        """
        ...

    def forget(self, key: str) -> None:
        """Drop what is remembered of a pool whose definition is gone; a no-op for an unknown one.

        A pool that was merely evicted is not forgotten: it may come back.
        """
        ...


class LruPolicy:
    """Evict the pool whose last request is longest ago."""

    name = "lru"

    def __init__(self) -> None:
        self._asked_at = _Memory()

    def note_asked(self, key: str, now: float) -> None:
        """Remember the time."""
        self._asked_at.put(key, now)

    def coldest_first(self, keys: Collection[str], now: float) -> list[str]:
        """Order by the time of the last request."""
        return sorted(keys, key=lambda key: (self._asked_at.get(key), key))

    def forget(self, key: str) -> None:
        """Drop the pool's time."""
        self._asked_at.drop(key)


class LfuPolicy:
    """Evict the pool with the fewest requests, each counting half after every half-life.

    A pool's count at time t is the sum of 2 ** ((t_i - t) / half_life) over its requests t_i. All
    counts decay alike, so their order does not depend on t: what is kept is log2 of the sum of
    2 ** (t_i / half_life), which needs no sweep over all pools and never overflows.

    Where a half-life passes between two requests this is nearly LRU, so that too short a one does
    little harm; too long a one clings to pools that were popular once.
    """

    name = "lfu"

    # 10 s had the most hits, on average, of 10, 60 and 600 s, light and busy, with 10 and 24 pools
    # at 4 to 10 requests a second; 2026-11-23, benchmarks/residency/policies.py
    def __init__(self, half_life_seconds: float = 10.0) -> None:
        if not (half_life_seconds > 0 and math.isfinite(half_life_seconds)):
            raise ConfigError(f"half-life of {half_life_seconds} s; expected more than 0")
        self._half_life = half_life_seconds
        self._heat = _Memory()

    def note_asked(self, key: str, now: float) -> None:
        """Add one request of this moment to the pool's count."""
        one = now / self._half_life
        heat = self._heat.get(key)
        low, high = sorted((heat, one))
        self._heat.put(key, high + math.log2(1.0 + 2.0 ** (low - high)))

    def coldest_first(self, keys: Collection[str], now: float) -> list[str]:
        """Order by the decayed count of requests."""
        return sorted(keys, key=lambda key: (self._heat.get(key), key))

    def forget(self, key: str) -> None:
        """Drop the pool's count."""
        self._heat.drop(key)


class PinnedFirstPolicy:
    """Evict preferred pools only after all others; within each class, as LRU does.

    A preference, not a pin: a preferred pool makes room when nothing else can.
    """

    name = "pinned-first"

    def __init__(self, preferred: Collection[str] = ()) -> None:
        self._preferred = frozenset(preferred)
        self._recency = LruPolicy()

    def note_asked(self, key: str, now: float) -> None:
        """Remember the time."""
        self._recency.note_asked(key, now)

    def coldest_first(self, keys: Collection[str], now: float) -> list[str]:
        """Order by class, then by the time of the last request."""
        by_recency = self._recency.coldest_first(keys, now)
        return sorted(by_recency, key=lambda key: key in self._preferred)

    def forget(self, key: str) -> None:
        """Drop the pool's time; a preference is the operator's and stays."""
        self._recency.forget(key)


def make_policy(name: str, preferred: Collection[str] = ()) -> EvictionPolicy:
    """Build the policy of a flag's value; only pinned-first looks at the preferred keys."""
    if name == "lru":
        return LruPolicy()
    if name == "lfu":
        return LfuPolicy()
    if name == "pinned-first":
        return PinnedFirstPolicy(preferred)
    raise ConfigError(f"eviction policy {name!r} is not known; there are {', '.join(POLICIES)}")


class _Memory:
    """A number by key; the keys longest not written make room for new ones."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[str, float] = OrderedDict()

    def get(self, key: str) -> float:
        return self._numbers.get(key, -math.inf)

    def put(self, key: str, number: float) -> None:
        self._numbers[key] = number
        self._numbers.move_to_end(key)
        if len(self._numbers) > REMEMBERED_KEYS:
            self._numbers.popitem(last=False)

    def drop(self, key: str) -> None:
        self._numbers.pop(key, None)
