"""The one table from our errors to HTTP: status, reason in the metrics, response and event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import Scope

from emo_serve.errors import (
    Draining,
    EmoServeError,
    EngineDead,
    LoadDeadlineExceeded,
    PoolBlocked,
    PoolConflict,
    PoolExists,
    PoolFileError,
    PoolInUse,
    PoolLoadFailed,
    PoolStoreError,
    PoolTooLarge,
    RequestError,
    StateConflict,
    TooManyQueued,
    TooManyWaiting,
    Unavailable,
    UnknownPool,
)

__all__ = [
    "REFUSAL_REASONS",
    "cause_of",
    "error_response",
    "last_events",
    "reason_of",
    "refusal",
    "retry_after_of",
    "route_path",
    "status_of",
]

_MESSAGES, _RESPONSES = "/v1/messages", "/v1/responses"
_KINDS = {HTTPStatus.BAD_REQUEST: "BadRequestError", HTTPStatus.NOT_FOUND: "NotFoundError"}
"""vLLM's words for these statuses; elsewhere it uses the status's phrase."""

_TABLE: tuple[tuple[type[EmoServeError], HTTPStatus, str], ...] = (
    (UnknownPool, HTTPStatus.NOT_FOUND, "unknown_pool"),
    (PoolConflict, HTTPStatus.BAD_REQUEST, "pool_conflict"),
    (PoolTooLarge, HTTPStatus.BAD_REQUEST, "pool_too_large"),
    (RequestError, HTTPStatus.BAD_REQUEST, "bad_request"),
    (PoolFileError, HTTPStatus.BAD_REQUEST, "bad_pool"),
    (PoolExists, HTTPStatus.CONFLICT, "pool_exists"),
    (PoolInUse, HTTPStatus.CONFLICT, "pool_in_use"),
    (StateConflict, HTTPStatus.CONFLICT, "state_conflict"),
    (PoolBlocked, HTTPStatus.SERVICE_UNAVAILABLE, "pool_blocked"),
    (TooManyWaiting, HTTPStatus.SERVICE_UNAVAILABLE, "too_many_waiting"),
    (TooManyQueued, HTTPStatus.SERVICE_UNAVAILABLE, "too_many_queued"),
    (LoadDeadlineExceeded, HTTPStatus.SERVICE_UNAVAILABLE, "load_deadline"),
    (Draining, HTTPStatus.SERVICE_UNAVAILABLE, "draining"),
    (Unavailable, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable"),
    (PoolLoadFailed, HTTPStatus.INTERNAL_SERVER_ERROR, "pool_load_failed"),
    (PoolStoreError, HTTPStatus.INTERNAL_SERVER_ERROR, "pool_store"),
    (EngineDead, HTTPStatus.INTERNAL_SERVER_ERROR, "engine_dead"),
    (EmoServeError, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"),
)
"""Subclasses before their base classes: the first match counts."""

REFUSAL_REASONS = tuple(reason for _, _, reason in _TABLE)
"""All values of the metrics' label `reason`."""


def status_of(error: EmoServeError) -> HTTPStatus:
    """Return the HTTP status that answers an error."""
    return next(status for cls, status, _ in _TABLE if isinstance(error, cls))


def reason_of(error: EmoServeError) -> str:
    """Return the name of this refusal in the metrics, one of REFUSAL_REASONS."""
    return next(reason for cls, _, reason in _TABLE if isinstance(error, cls))


def retry_after_of(error: EmoServeError) -> int | None:
    """Return the seconds to send as Retry-After; None unless the error is Unavailable."""
    return error.retry_after_seconds if isinstance(error, Unavailable) else None


def cause_of(error: BaseException | None) -> EmoServeError | None:
    """Return the error of ours that this exception is, or was raised from; None for any other."""
    while error is not None and not isinstance(error, EmoServeError):
        error = error.__cause__
    return error


def refusal(
    scope: Scope, error: EmoServeError, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the complete response to a request that one of our errors refuses."""
    seconds = retry_after_of(error)
    retry_after = {} if seconds is None else {"retry-after": str(seconds)}
    all_headers = {**(headers or {}), **retry_after}
    return error_response(scope, status_of(error), str(error), all_headers)


def error_response(
    scope: Scope, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an error in the shape of the request's route, as vLLM's own handlers write it.

    That is Anthropic's for /v1/messages and below it, OpenAI's elsewhere.
    """
    return JSONResponse(_error_document(scope, status, message), status, headers)


def last_events(scope: Scope, error: EmoServeError, number: int) -> bytes:
    """Return what ends a stream after its first `number` events, in the shape of its route."""
    path, status = route_path(scope), status_of(error)
    if path.startswith(_RESPONSES):
        flat = {"type": "error", "code": _kind_of(status), "message": str(error), "param": None}
        return _event("event: error\n", {**flat, "sequence_number": number})
    if path.startswith(_MESSAGES):
        return _event("event: error\n", _error_document(scope, status, str(error)))
    return _event("", _error_document(scope, status, str(error))) + b"data: [DONE]\n\n"


def _event(prefix: str, document: Mapping[str, object]) -> bytes:
    return f"{prefix}data: {json.dumps(document)}\n\n".encode()


def _error_document(scope: Scope, status: HTTPStatus, message: str) -> dict[str, object]:
    kind = _kind_of(status)
    if route_path(scope).startswith(_MESSAGES):
        return {"type": "error", "error": {"type": kind, "message": message}}
    openai = {"message": message, "type": kind, "param": None, "code": status.value}
    return {"error": openai}


def _kind_of(status: HTTPStatus) -> str:
    return _KINDS.get(status, status.phrase)


def route_path(scope: Scope) -> str:
    """Return the path that Starlette's router compares with its routes."""
    path, root_path = scope["path"], scope.get("root_path", "")
    rest: str = path.removeprefix(root_path)
    return rest if path.startswith(root_path) and (not rest or rest[0] == "/") else path
