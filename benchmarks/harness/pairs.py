"""Measurements taken in turn and compared by round: what a machine's drift does not spoil."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from benchmarks.harness.progress import steps

__all__ = ["Spread", "in_turn"]

_Sample = TypeVar("_Sample")


def in_turn(rounds: int, *measures: Callable[[], _Sample]) -> list[list[_Sample]]:
    """Take each measurement once per round; return the rounds but the first, which warms up."""
    turns = steps(range(rounds + 1), "rounds")
    return [[measure() for measure in measures] for _ in turns][1:]


@dataclass(frozen=True)
class Spread:
    """The ratios of all rounds: median, least and largest."""

    median: float
    min: float
    max: float

    @classmethod
    def of_ratios(cls, rounds: Sequence[Sequence[float]]) -> Spread:
        """Return the spread of B / A over rounds of (A, B)."""
        ratios = [b / a for a, b in rounds]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return asdict(self)
