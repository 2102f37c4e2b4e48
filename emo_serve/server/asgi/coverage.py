"""How a client is told its pool and coverage: response headers, a JSON field, an extra event.

Pure text in, text out; admission decides when. A JSON body gets `emo_serve` as its last field, and
is otherwise the same bytes. A stream gets one event before `data: [DONE]`, shaped like the usage
chunk: it has no choices, so OpenAI clients skip it. A stream of /v1/responses has the field in the
response of its last event, one of /v1/messages in its last event, `message_stop`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emo_serve.errors import RequestError
from emo_serve.server.coverage import CoverageSum, share_of

__all__ = ["COVERAGE_HEADER", "CoverageReport", "EventTail", "body_with", "wants_coverage"]

COVERAGE_HEADER = "x-emo-coverage"

_FIELD = "emo_serve"
_WORDS = {"true": True, "1": True, "false": False, "0": False}
_DIGITS = 4
_DONE = b"data: [DONE]"
_COMPLETED = b"event: response.completed\ndata: "
_STOPPED = b"event: message_stop\ndata: "
_END_OF_EVENT = b"\n\n"  # as vLLM writes it
_CHUNKS = ("chat.completion.chunk", "text_completion")
_IDENTITY = ("id", "object", "created", "model")


def wants_coverage(values: Iterable[str]) -> bool:
    """Read the values of the request header x-emo-coverage, usually none or one.

    Raises RequestError for values other than true, 1, false or 0 in any case, and for both at once.
    """
    found = set()
    for value in values:
        word = _WORDS.get(value.strip().lower())
        if word is None:
            raise RequestError(
                f"{COVERAGE_HEADER} is {value!r}; send true to get the request's coverage, or false"
            )
        found.add(word)
    if len(found) > 1:
        raise RequestError(f"{COVERAGE_HEADER} is sent twice, true and false; send it once")
    return True in found


@dataclass(frozen=True)
class CoverageReport:
    """The report on one HTTP request, all its engine requests together.

    `pool` may be several names, joined by commas. `coverage` is a share from 0 to 1, None if no
    token was routed.
    """

    pool: str
    coverage: float | None
    routed_tokens: int

    @classmethod
    def of(cls, pools: str, sums: Iterable[CoverageSum | None]) -> CoverageReport:
        """Add up the sums of the engine requests, so that every token counts the same."""
        total = sum((one for one in sums if one is not None), CoverageSum(0.0, 0))
        coverage = round(share_of(total), _DIGITS) if total.tokens else None
        return cls(pools, coverage, total.tokens)

    @property
    def headers(self) -> dict[str, str]:
        """Return the coverage header; no header if no token was routed."""
        if self.coverage is None:
            return {}
        return {COVERAGE_HEADER: f"{self.coverage:.{_DIGITS}f}"}


def body_with(body: bytes, report: CoverageReport) -> bytes:
    """Return a JSON object with the report as its last field; other bodies unchanged."""
    text = body.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return body
    fields = text[:-1].rstrip()
    comma = b"" if fields == b"{" else b","
    return fields + comma + _compact({_FIELD: asdict(report)})[1:]


class EventTail:
    """Split a stream into server-sent events, and make the event that carries the report.

    `rest` is the beginning of an event that is not complete yet.
    """

    def __init__(self) -> None:
        self.rest = b""
        self._identity: dict[str, Any] | None = None

    def take(self, data: bytes) -> Sequence[bytes]:
        """Return the events that this data completes."""
        *events, self.rest = (self.rest + data).split(_END_OF_EVENT)
        complete = [event + _END_OF_EVENT for event in events]
        for event in complete:
            if self._identity is None:
                self._identity = _identity_of(event)
        return complete

    @staticmethod
    def is_last(event: bytes) -> bool:
        """Tell whether this event is `data: [DONE]`, a completed response or a message's end."""
        return event.startswith((_DONE, _COMPLETED, _STOPPED))

    def last(self, event: bytes, report: CoverageReport) -> bytes:
        """Return the last event, with the report in it or before it."""
        if event.startswith(_COMPLETED):
            return _completed_with(event, report)
        if event.startswith(_STOPPED):
            return _STOPPED + body_with(event.removeprefix(_STOPPED), report) + _END_OF_EVENT
        return self.event(report) + event

    def event(self, report: CoverageReport) -> bytes:
        """Return the report as an event, or nothing if the stream had no OpenAI chunk."""
        if self._identity is None:
            return b""
        fields = {**self._identity, "choices": [], _FIELD: asdict(report)}
        return b"data: " + _compact(fields) + _END_OF_EVENT


def _identity_of(event: bytes) -> dict[str, Any] | None:
    """Return the fields that all chunks of a stream share, or None if this is not a chunk."""
    name, _, value = event.partition(b":")
    if name != b"data":
        return None
    try:
        chunk = json.loads(value)
    except ValueError:
        return None
    if not isinstance(chunk, dict) or chunk.get("object") not in _CHUNKS:
        return None
    return {key: chunk[key] for key in _IDENTITY if key in chunk}


def _completed_with(event: bytes, report: CoverageReport) -> bytes:
    fields = json.loads(event.removeprefix(_COMPLETED))
    fields["response"][_FIELD] = asdict(report)
    return _COMPLETED + _compact(fields) + _END_OF_EVENT


def _compact(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
