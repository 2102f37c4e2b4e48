"""A request header that has one value, if it is sent."""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.errors import RequestError

__all__ = ["one_value"]


def one_value(header: str, values: Sequence[str]) -> str | None:
    """Return a header's value in lower case, None if it was not sent; equal values are one.

    Raises RequestError for two that differ.
    """
    given = {value.strip().lower() for value in values}
    if len(given) > 1:
        raise RequestError(f"{header} is sent with two values; send one")
    return next(iter(given), None)
