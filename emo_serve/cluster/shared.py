"""What operators have defined and pinned, the same on every replica in the end.

Each replica has all of it. A change is news with a stamp: a number above all that its replica has
seen, and the replica's name. Of two pieces of news about one thing the later stamp counts, whatever
the order in which they arrive and however often. So replicas that have heard the same news agree,
without a leader, and nobody must remember who has heard what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["News", "SharedPools", "Stamp"]

_Kind = Literal["pool", "pin"]


@dataclass(frozen=True, order=True)
class Stamp:
    """When a change was made, and where; stamps of different changes differ."""

    number: int
    replica: str


@dataclass(frozen=True)
class News:
    """One change to a pool's definition or to a pin.

    `value` is the pool's document, or what `pins.pinned_on` says of a pin; None if it was removed.
    `over` is the stamp of the news that it replaces, as far as its replica knew.
    """

    kind: _Kind
    name: str
    value: str | None
    stamp: Stamp
    over: Stamp | None = None

    @property
    def key(self) -> tuple[_Kind, str]:
        """Return what the news are about."""
        return self.kind, self.name


class SharedPools:
    """The latest news about everything that was changed since the fleet began."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._number = 0
        self._latest: dict[tuple[_Kind, str], News] = {}

    def note(self, kind: _Kind, name: str, value: str | None) -> News:
        """Make news of a change that was made here."""
        before = self._latest.get((kind, name))
        over = None if before is None else before.stamp
        news = News(kind, name, value, Stamp(self._number + 1, self._replica), over)
        self.take(news)
        return news

    def take(self, news: News) -> bool:
        """Hear news; False if later ones about the same, or these, are known already."""
        self._number = max(self._number, news.stamp.number)
        known = self._latest.get(news.key)
        if known is not None and known.stamp >= news.stamp:
            return False
        self._latest[news.key] = news
        return True

    def overtakes_mine(self, news: News) -> bool:
        """Tell whether news replace a change made here that their replica had not heard of."""
        mine = self._latest.get(news.key)
        return (
            mine is not None
            and mine.stamp.replica == self._replica
            and mine.stamp != news.over
            and mine.stamp < news.stamp
        )

    def pins(self) -> tuple[News, ...]:
        """Return the latest news of each name that is pinned, on all replicas or some."""
        return tuple(
            news for news in self._latest.values() if news.kind == "pin" and news.value is not None
        )

    def all(self) -> tuple[News, ...]:
        """Return everything, in the order in which it was changed."""
        return tuple(sorted(self._latest.values(), key=lambda news: news.stamp))

    def lacking(self, stamps: Iterable[Stamp]) -> tuple[News, ...]:
        """Return what somebody with these stamps has not heard."""
        known = set(stamps)
        return tuple(news for news in self.all() if news.stamp not in known)
