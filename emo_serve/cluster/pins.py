"""Which replicas hold a pin: all, or so many of those that run now.

Every replica finds out for itself, from the pin's news and the replicas that run, so a pin moves
when one that held it dies, and nobody has to say where to.
"""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.cluster.rendezvous import Rendezvous

__all__ = ["EVERYWHERE", "holders", "pinned_on"]

EVERYWHERE = ""
"""The value of a pin's news for one that all replicas hold."""


def pinned_on(count: int | None) -> str | None:
    """Return the value of a pin's news: None for all replicas, 0 for no pin any more."""
    if count is None:
        return EVERYWHERE
    return str(count) if count > 0 else None


def holders(
    pool: str, value: str | None, replicas: Sequence[str], order: Rendezvous
) -> frozenset[str]:
    """Return which of the replicas that run hold a pin: the first of the pool's order."""
    if value is None:
        return frozenset()
    ranks = order.ranks(pool, replicas)
    return frozenset(ranks if value == EVERYWHERE else list(ranks)[: int(value)])
