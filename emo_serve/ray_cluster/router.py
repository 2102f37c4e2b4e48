"""Ray Serve's request router around our rules: a thin shell, which knows Ray and nothing of pools.

Ray asks it in every proxy. What a replica publishes (`record_routing_stats`) arrives by Ray's
controller; a replica's load is what this proxy has sent it and heard from it.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from emo_serve.cluster.fleet import FleetRouter, Known
from emo_serve.cluster.ticket import NO_TICKET, Ticket

__all__ = ["PoolAffinityRouter"]


class PoolAffinityRouter(RequestRouter):
    """Send a request to a replica that has its pool, unless that is much busier than others."""

    def initialize_state(self, **_: Any) -> None:
        """Begin with nothing sent; Ray calls this once."""
        self._fleet = FleetRouter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates one by one, in the order to try them."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all were tried
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = [self._known(replica) for replica in candidate_replicas]
        order = self._fleet.order(_ticket(pending_request), known, time.monotonic())
        return [[by_name[name]] for name in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note which replica has taken a request."""
        known = [self._known(replica) for replica in self.curr_replicas.values()]
        ticket, now = _ticket(pending_request), time.monotonic()
        self._fleet.note_sent(ticket, replica_id.unique_id, known, now)

    def _known(self, replica: RunningReplica) -> Known:
        load = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Known(replica.replica_id.unique_id, load, replica.routing_stats or {})


def _ticket(request: PendingRequest | None) -> Ticket:
    return NO_TICKET if request is None else Ticket.decode(request.metadata.multiplexed_model_id)
