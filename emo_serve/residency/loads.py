"""The loads that are running: tasks of the queue's own, of which at most one copies.

A load belongs to no request, so a client that goes away neither interrupts nor repeats it. Loads
that copy share one link to the device and go one at a time; one that only publishes a row does not
need the link.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from emo_serve.errors import EngineDead
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.ports import LoadReport, PoolEngine, ResidencyObserver
from emo_serve.residency.records import ResidentPool
from emo_serve.residency.resident import ResidentPools
from emo_serve.residency.slots import LoadPlan

__all__ = ["RunningLoads"]

logger = logging.getLogger(__name__)


class RunningLoads:
    """Carry out plans: take room, have the engine copy, publish or give the room back.

    `on_end` is called in the very step in which a load succeeded, or failed with an error;
    `on_done` once the load no longer counts as running, whatever its outcome.
    """

    def __init__(
        self,
        resident: ResidentPools,
        engine: PoolEngine,
        observer: ResidencyObserver,
        on_end: Callable[[ExpertPool, Exception | None], None],
        on_done: Callable[[], None],
    ) -> None:
        self._resident = resident
        self._engine = engine
        self._observer = observer
        self._on_end = on_end
        self._on_done = on_done
        self._tasks: dict[asyncio.Task[None], bool] = {}  # -> whether it copies
        self._last_seconds = 0.0

    # -- questions --

    @property
    def is_copying(self) -> bool:
        """Tell whether the link to the device is taken."""
        return any(self._tasks.values())

    @property
    def last_seconds(self) -> float:
        """Return how long the last load took that copied; 0 before the first."""
        return self._last_seconds

    # -- loads --

    def start(self, pool: ExpertPool, plan: LoadPlan, staying: Mapping[str, str]) -> bool:
        """Begin a load and return True; if its files cannot be read, fail it and return False.

        The plan's victims are evicted only once the files are known to be readable; `staying` names
        the sizes of them that stay.
        """
        try:
            self._engine.check_readable(plan.copies)
        except Exception as error:  # the caller may be a request for quite another pool
            self._note_failure(pool, error)
            return False
        resident = self._resident.begin(pool, plan, staying)
        task = asyncio.create_task(self._load(resident, plan))
        self._tasks[task] = bool(plan.copies)
        task.add_done_callback(self._note_done)
        return True

    async def _load(self, resident: ResidentPool, plan: LoadPlan) -> None:
        """Copy and publish; a failure gives back slots and row."""
        pool = resident.pool
        try:
            report = await self._engine.make_resident(
                resident.row, pool.expert_ids, pool.router_temperature, plan.copies
            )
        except (Exception, asyncio.CancelledError) as error:
            self._resident.abandon(resident)
            this_task = asyncio.current_task()
            if this_task is not None and this_task.cancelling():  # the event loop is closing
                raise
            if isinstance(error, asyncio.CancelledError):
                error = EngineDead("the load was given up by the engine's client")
            self._note_failure(pool, error)
            return
        self._resident.publish(resident)
        if plan.copies:
            self._note_load(pool, report)
        self._on_end(pool, None)

    def _note_load(self, pool: ExpertPool, report: LoadReport) -> None:
        self._last_seconds = report.seconds
        logger.info(
            "loaded pool %s in %.3f s: %d of its %d experts copied, %d bytes read",
            *(pool.name, report.seconds, report.experts_copied, report.num_experts),
            report.bytes_read,
        )
        self._observer.count_load(pool.name, report)

    def _note_failure(self, pool: ExpertPool, error: Exception) -> None:
        logger.error("pool %s could not be loaded: %s", pool.name, error)
        self._observer.count_failed_load(pool.name)
        self._on_end(pool, error)

    def _note_done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if task.cancelled():  # the event loop is closing
            return
        if (error := task.exception()) is not None:
            logger.error("an error occurred after a load had ended", exc_info=error)
        self._on_done()

    # -- self-check --

    def check_integrity(self) -> None:
        """Assert that at most one load copies."""
        assert sum(self._tasks.values()) <= 1, "two loads copy at once"
