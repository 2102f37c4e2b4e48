"""vLLM's OpenTelemetry spans, with what only the front end knows of a request.

vLLM writes one span `llm_request` per request that has ended, if --otlp-traces-endpoint is given.
The coverage of a request is known a moment later, with the next read of the workers' sums. So the
span is held back until then, with the time at which vLLM would have ended it.

Replaced in vLLM (0.32.0): the name `instrument_manual` in v1/engine/output_processor.py, by which
`OutputProcessor.do_tracing` writes the span.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.tracing import SpanAttributes
from vllm.v1.engine import output_processor

from emo_serve.server.coverage import CoverageSum, share_of

__all__ = ["RequestSpans", "trace_requests"]

_PREFIX = "emo_serve."


@dataclass
class _Request:
    attributes: dict[str, Any]
    spans: list[dict[str, Any]] = field(default_factory=list)


class RequestSpans:
    """Hold spans back until all is known of their request; `send` writes one, as vLLM does.

    Spans of requests that were not noted, which are the server's own, are written at once.
    """

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._requests: dict[str, _Request] = {}  # by the id that vLLM's caller gave

    def note(self, request_id: str, pool: str, *, is_hit: bool, wait_seconds: float) -> None:
        """Note that a request has its pool now; `settle` must follow when it has ended."""
        values = {"pool": pool, "pool_hit": is_hit, "wait_seconds": wait_seconds}
        named = {_PREFIX + name: value for name, value in values.items()}
        self._requests[request_id] = _Request(named)

    def hold(
        self,
        span_name: str,
        start_time: int,
        end_time: int | None = None,
        attributes: dict[str, Any] | None = None,
        context: Any = None,
        kind: Any = None,
    ) -> None:
        """Take a span from vLLM; times are in nanoseconds of Unix time."""
        attributes = attributes or {}
        span = {"span_name": span_name, "start_time": start_time, "context": context, "kind": kind}
        span |= {"attributes": attributes, "end_time": end_time or time.time_ns()}
        request = self._requests.get(attributes.get(SpanAttributes.GEN_AI_REQUEST_ID, ""))
        if request is None:
            self._send(**span)
        else:
            request.spans.append(span)

    def settle(self, request_id: str, coverage: CoverageSum | None) -> None:
        """Write the spans of a request that has ended; None for an unknown coverage."""
        request = self._requests.pop(request_id, None)
        if request is None:  # it never had its pool
            return
        if coverage is not None:
            request.attributes[f"{_PREFIX}coverage"] = share_of(coverage)
        for span in request.spans:
            self._send(**{**span, "attributes": {**span["attributes"], **request.attributes}})


def trace_requests(engine: Any) -> RequestSpans | None:
    """Add to the spans of an engine's requests from now on; None if it writes none."""
    if engine.observability_config.otlp_traces_endpoint is None:
        return None
    spans = RequestSpans(output_processor.instrument_manual)
    output_processor.instrument_manual = spans.hold
    return spans
