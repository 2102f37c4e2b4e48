"""What our routes answer beside success: each status with its meaning and the shape of its body."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = ["CHANGING", "READING", "READY_RESPONSES", "ErrorAnswer", "ErrorDetails", "responses"]


class ErrorDetails(BaseModel):
    """What happened, what was expected, and the remedy."""

    message: str
    type: str = Field(description="a word for the status, e.g. `NotFoundError`")
    param: str | None = Field(description="the field or query parameter to blame")
    code: int = Field(description="the status once more")


class ErrorAnswer(BaseModel):
    """Any error, in OpenAI's shape."""

    error: ErrorDetails


_MEANINGS = {
    400: "the request is invalid; the message names field, layer and value",
    401: "no key, or a key that the server does not know",
    403: "an API key where an admin key is needed",
    404: "no such pool; the message names those that exist",
    408: "the body did not come in time",
    409: "the current state of the pools does not allow it",
    413: "the body is too large",
    500: "the experts cannot be read, or the pool's file cannot be written",
    503: "the request may succeed later; see Retry-After",
}

READING = (400, 401)
"""What any route that reads may answer."""

CHANGING = (*READING, 403, 408, 409, 413, 500, 503)
"""What any route that changes pools may answer."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return a route's `responses` for these statuses of errors."""
    return {status: {"description": _MEANINGS[status], "model": ErrorAnswer} for status in statuses}


def _readiness(description: str) -> dict[str, Any]:
    schema = {
        "title": "Readiness",
        "type": "object",
        "properties": {
            "ready": {"type": "boolean"},
            "reason": {"type": "string", "description": "why not; left out if ready"},
        },
        "required": ["ready"],
    }
    return {"description": description, "content": {"application/json": {"schema": schema}}}


READY_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: _readiness("new requests are taken"),
    503: _readiness("the server drains, or its engine has died, is stopped or makes no step"),
    **responses(401),
}
"""What GET /ready answers; 401 only if --open-paths leaves it out."""
