"""The header by which a client says how small a part of its pool may serve it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emo_serve.errors import RequestError
from emo_serve.server.asgi.one_value import one_value

__all__ = ["MIN_EXPERTS_HEADER", "WHOLE", "wanted_min_experts"]

MIN_EXPERTS_HEADER = "x-emo-min-experts"
WHOLE = 0
"""Stands for `all`: the request is to be served in its whole pool."""

_WORD = "all"


def wanted_min_experts(values: Sequence[str]) -> int | None:
    """Read the values of x-emo-min-experts: a number of experts per layer, WHOLE, None if not sent.

    Raises RequestError for other values, and for two that differ.
    """
    word = one_value(MIN_EXPERTS_HEADER, values)
    if word is None:
        return None
    if word == _WORD:
        return WHOLE
    if not re.fullmatch(r"[1-9][0-9]{0,4}", word):
        raise RequestError(
            f"{MIN_EXPERTS_HEADER} is {word[:80]!r}; send the least experts per layer that may"
            f" serve the request, a whole number from 1, or {_WORD!r} for the whole pool"
        )
    return int(word)
