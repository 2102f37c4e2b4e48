"""What coverage is made of: mass inside a request's pool, summed over its tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CoverageSum", "share_of"]


@dataclass(frozen=True)
class CoverageSum:
    """The share of the full router's mass inside the pool, summed over some tokens.

    Each token's share is a mean over MoE layers; coverage is `mass / tokens`.
    """

    mass: float
    tokens: int

    def __add__(self, other: CoverageSum) -> CoverageSum:
        return CoverageSum(self.mass + other.mass, self.tokens + other.tokens)


def share_of(total: CoverageSum) -> float:
    """Return the coverage of a sum of one or more tokens, at most 1 whatever was rounded."""
    return min(1.0, total.mass / total.tokens)
