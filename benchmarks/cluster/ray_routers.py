"""Routers of Ray Serve's kind that know nothing of pools, to compare ours with.

Ray imports them in its proxies, so this module imports Ray.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

__all__ = ["PowerOfTwoRouter", "RoundRobinRouter"]


class RoundRobinRouter(RequestRouter):
    """Take the replicas in turn."""

    def initialize_state(self, **_: Any) -> None:
        """Begin with the first; Ray calls this once."""
        self._turn = 0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates one by one, from the next one on."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ordered = sorted(candidate_replicas, key=lambda one: one.replica_id.unique_id)
        self._turn += 1
        first = self._turn % max(1, len(ordered))
        return [[one] for one in (*ordered[first:], *ordered[:first])]


class PowerOfTwoRouter(PowerOfTwoChoicesRequestRouter):
    """Ray's default; it would take our ticket for the name of a multiplexed model."""

    def apply_multiplex_routing(
        self, pending_request: PendingRequest | None = None
    ) -> Set[ReplicaID]:
        """Choose as for a request without such a name."""
        found: Set[ReplicaID] = self.apply_locality_routing(pending_request)
        return found
