"""vLLM's figures without the server's own requests, which are no user's.

vLLM counts a request where it handles the engine's outputs. Here the outputs of own requests are
handled with statistics that nobody reads, and a step that answered own requests only is recorded as
one without answers. So no counter, histogram or log of throughput has them. Gauges of the scheduler
are another thing: running requests and use of the KV cache show what the engine does just now.
"""

from __future__ import annotations

from typing import Any

__all__ = ["leave_out"]


def leave_out(engine: Any, id_prefix: str) -> None:
    """Leave requests whose ids begin so out of the figures of vLLM's AsyncLLM, from now on."""
    figures = _Figures(engine, id_prefix)
    engine.output_processor.process_outputs = figures.process_outputs
    if engine.logger_manager is not None:  # None with --disable-log-stats
        engine.logger_manager.record = figures.record


class _Figures:
    """What replaces `OutputProcessor.process_outputs` and `StatLoggerManager.record`."""

    def __init__(self, engine: Any, id_prefix: str) -> None:
        self._process = engine.output_processor.process_outputs
        self._record = engine.logger_manager.record if engine.logger_manager else None
        self._id_prefix = id_prefix
        self._counted: object = None  # the statistics of the last step that answered a user

    def process_outputs(
        self, outputs: list[Any], timestamp: Any = None, stats: Any = None, **options: Any
    ) -> Any:
        """Handle some outputs of one step; `stats` are the step's."""
        own: list[Any] = []
        others: list[Any] = []
        for output in outputs:
            is_own = output.request_id.startswith(self._id_prefix)
            (own if is_own else others).append(output)
        if others:
            self._counted = stats
        if not own or stats is None:
            return self._process(outputs, timestamp, stats, **options)
        done = self._process(own, timestamp, type(stats)(), **options)
        if not others:
            return done
        rest = self._process(others, timestamp, stats, **options)
        return type(rest)(
            request_outputs=[*done.request_outputs, *rest.request_outputs],
            reqs_to_abort=[*done.reqs_to_abort, *rest.reqs_to_abort],
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, **options: Any) -> None:
        """Record one step, without answers unless a user had one."""
        assert self._record is not None
        is_users = iteration_stats is self._counted
        self._record(scheduler_stats, iteration_stats if is_users else None, **options)
