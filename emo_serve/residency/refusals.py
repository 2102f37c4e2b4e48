"""The errors of requests that cannot wait for their pool, or have waited too long."""

from __future__ import annotations

from emo_serve.errors import LoadDeadlineExceeded, PoolBlocked, TooManyWaiting
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.estimate import WaitEstimate
from emo_serve.residency.pending import PendingPools
from emo_serve.residency.records import Purpose
from emo_serve.residency.resident import ResidentPools
from emo_serve.residency.room import Room

__all__ = ["Refusals"]


class Refusals:
    """Check the limits of waiting, and build the errors of requests that exceed them.

    Checking changes nothing. Temporary errors say after how many seconds to try again.
    """

    def __init__(
        self,
        room: Room,
        resident: ResidentPools,
        pending: PendingPools,
        estimate: WaitEstimate,
        max_waiting: int,
    ) -> None:
        self._room = room
        self._resident = resident
        self._pending = pending
        self._estimate = estimate
        self._max_waiting = max_waiting

    def check_may_wait(self, pool: ExpertPool, purpose: Purpose) -> None:
        """Raise PoolTooLarge, PoolBlocked or TooManyWaiting unless somebody may wait for it.

        An operator, and the server itself, may always wait when nobody does. The server, which does
        not come back, is promised no place.
        """
        if not self._room.is_streamed(pool):
            self._room.check_can_ever_fit(pool)
        if not self._room.fits(self._room.demand(pool), without=self._resident.unpinned):
            raise self.blocked(pool)
        waiting = self._pending.num_waiters
        least = 0 if purpose is Purpose.LEASE else 1
        if waiting >= max(least, self._max_waiting):
            raise TooManyWaiting(
                f"the waiting queue is full: {waiting} requests wait for loads already"
                f" (--max-waiting {self._max_waiting}), and pool {pool.name!r} is not resident;"
                " retry later, or raise --max-waiting",
                1 if purpose is Purpose.GROW else self._estimate.until_place(),
            )

    def blocked(self, pool: ExpertPool) -> PoolBlocked:
        """Return the error for a pool that does not fit beside the pinned ones."""
        names = ", ".join(self._resident.pinned_names)
        has_slots = self._room.slots.fits(pool.expert_ids, without=self._resident.unpinned)
        what, flags = (
            ("rows", "--max-pools") if has_slots else ("slots", "--expert-memory or --expert-slots")
        )
        return PoolBlocked(
            f"pool {pool.name!r} cannot be loaded: the pinned pools ({names}) leave too few {what}"
            f" for it; unpin one, or raise {flags}",
            self._estimate.until_served(pool.content_hash),
        )

    def too_late(self, pool: ExpertPool, deadline_seconds: float) -> LoadDeadlineExceeded:
        """Return the error for a request whose pool was not loaded in time."""
        running = sum(resident.leases for resident in self._resident if resident.is_closing)
        return LoadDeadlineExceeded(
            f"pool {pool.name!r} was not loaded within {deadline_seconds:g} s"
            f" (pools in the waiting queue: {len(self._pending)}; requests still running in pools"
            f" that must go first: {running}); retry later, raise --load-deadline, or give experts"
            " more room",
            self._estimate.until_served(pool.content_hash),
        )
