"""An order of replicas for each pool that all routers agree on without talking.

Rendezvous hashing: each pair of pool and replica has a number, and a pool's replicas are ordered by
it. A replica that comes or goes moves only the pools whose first choice it is, and pools are spread
evenly over replicas, whatever their names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["Rendezvous"]

_REMEMBERED = 4096  # pools; unions make their number the clients' choice


class Rendezvous:
    """Order replicas by pool; remembers the orders of the pools last asked for."""

    def __init__(self) -> None:
        self._members: tuple[str, ...] = ()
        self._ranks: OrderedDict[str, dict[str, int]] = OrderedDict()

    def ranks(self, pool: str, replicas: Sequence[str]) -> dict[str, int]:
        """Return each replica's place in the pool's order, 0 for the first, and in that order."""
        members = tuple(sorted(replicas))
        if members != self._members:
            self._members = members
            self._ranks.clear()
        ranks = self._ranks.get(pool)
        if ranks is None:
            ordered = sorted(members, key=lambda replica: _number(pool, replica))
            ranks = {replica: rank for rank, replica in enumerate(ordered)}
            if len(self._ranks) == _REMEMBERED:
                self._ranks.popitem(last=False)
            self._ranks[pool] = ranks
        else:
            self._ranks.move_to_end(pool)
        return ranks


def _number(pool: str, replica: str) -> bytes:
    return blake2b(f"{pool}\0{replica}".encode(), digest_size=8).digest()
