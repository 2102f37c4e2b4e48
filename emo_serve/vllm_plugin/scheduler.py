"""Steps of their own for requests of streamed pools, so that other requests do not wait for reads.

A step in which experts are streamed takes long, and every request in it waits. So requests of
streamed pools and all others take turns: a step has requests of one kind only, and while both have
work, streaming gets a fixed share of the time. A single streamed step still holds the others up for
as long as it takes.

Upstream: vllm 0.32.0, v1/core/sched/scheduler.py. Running requests whose
`next_decode_eligible_step` is yet to come, and waiting ones that `_handle_blocked_waiting_request`
refuses, keep their places.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from emo_serve.vllm_plugin.contract import STREAMED_ARG

__all__ = ["TurnScheduler", "Turns"]

_STREAM_SHARE = 0.2
"""Of the time while both kinds have work: others then take 1 / (1 - 0.2) = 1.25 of their time."""

_NEVER = 2**62


class Turns:
    """Decide whose turn it is, from how long the steps before took."""

    def __init__(self, stream_share: float = _STREAM_SHARE) -> None:
        self._others_per_streamed = (1 - stream_share) / stream_share
        self._owed_seconds = 0.0  # to the others, before anything is streamed again
        self._idle: bool | None = None

    def is_streamed_next(self) -> bool:
        """Tell whether streamed requests are to run in the next step, if both kinds have work."""
        if self._idle is not None:
            return not self._idle
        return self._owed_seconds <= 0

    def note(self, seconds: float, *, is_streamed: bool, is_empty: bool) -> None:
        """Note a step, and whether nothing could run in it: then it is the other kind's turn."""
        self._idle = is_streamed if is_empty else None
        if is_streamed:
            self._owed_seconds = seconds * self._others_per_streamed
        else:
            self._owed_seconds = max(0.0, self._owed_seconds - seconds)


class TurnScheduler(Scheduler):
    """vLLM's scheduler for steps that wait for their results, as on CPUs."""

    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = Turns()
        self._streamed: set[str] = set()  # requests, by id
        self._turn: bool | None = None  # whether streamed requests run; None if all may
        self._began = 0.0

    def add_request(self, request: Any) -> None:
        """Add a request as upstream does, and note whether its pool is streamed."""
        super().add_request(request)
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        if extra_args.get(STREAMED_ARG) is True:
            self._streamed.add(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step as upstream does, of requests of one kind."""
        self._turn = None
        if self._streamed:
            self._streamed &= self.requests.keys()
            if 0 < len(self._streamed) < len(self.requests):
                self._turn = self._turns.is_streamed_next()
            for request in self.running:
                request.next_decode_eligible_step = 0 if self._may_run(request) else _NEVER
        self._began = self._clock()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step's results as upstream does, and note how long it took."""
        if self._turn is not None:
            self._turns.note(
                self._clock() - self._began,
                is_streamed=self._turn,
                is_empty=not scheduler_output.total_num_scheduled_tokens,
            )
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        if not self._may_run(request):
            return False
        return super()._handle_blocked_waiting_request(request)  # type: ignore[no-any-return]

    def _may_run(self, request: Any) -> bool:
        return self._turn is None or self._turn == (request.request_id in self._streamed)
