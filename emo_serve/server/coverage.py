"""The sums behind coverage: router mass inside a request's pool, added over its tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CoverageSum", "share_of"]


@dataclass(frozen=True)
class CoverageSum:
    """The full router's mass inside the pool, summed over `tokens` tokens.

    Each token adds a share from 0 to 1, its mean over MoE layers; coverage is `mass / tokens`.
    """

    mass: float
    tokens: int

    def __add__(self, other: CoverageSum) -> CoverageSum:
        return CoverageSum(self.mass + other.mass, self.tokens + other.tokens)


def share_of(total: CoverageSum) -> float:
    """Return the coverage of a sum over at least one token, at most 1 despite rounding."""
    return min(1.0, total.mass / total.tokens)
