"""The one table from our errors to HTTP: status, reason in the metrics, and response."""

from __future__ import annotations

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
    "error_response",
    "reason_of",
    "refusal",
    "retry_after_of",
    "route_path",
    "status_of",
]

_MESSAGES = "/v1/messages"
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
    kind = _KINDS.get(status, status.phrase)
    if route_path(scope).startswith(_MESSAGES):
        anthropic = {"type": "error", "error": {"type": kind, "message": message}}
        return JSONResponse(anthropic, status, headers)
    openai = {"message": message, "type": kind, "param": None, "code": status.value}
    return JSONResponse({"error": openai}, status, headers)


def route_path(scope: Scope) -> str:
    """Return the path that Starlette's router compares with its routes."""
    path, root_path = scope["path"], scope.get("root_path", "")
    rest: str = path.removeprefix(root_path)
    return rest if path.startswith(root_path) and (not rest or rest[0] == "/") else path
