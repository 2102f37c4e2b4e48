"""The header by which a client chooses the temperature its tokens are routed at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emo_serve.errors import RequestError
from emo_serve.server.asgi.one_value import one_value

__all__ = ["ROUTER_TEMPERATURE_HEADER", "wanted_temperature"]

ROUTER_TEMPERATURE_HEADER = "x-emo-router-temperature"

# Every temperature makes a pool of its own, so there are not more of them than anybody can tell
# apart.
_PATTERN = r"\d{1,3}(\.\d{1,2})?"


def wanted_temperature(values: Sequence[str]) -> float | None:
    """Read the values of x-emo-router-temperature; None if not sent.

    Raises RequestError for what is no number above 0 with at most two decimals, and for two values.
    """
    text = one_value(ROUTER_TEMPERATURE_HEADER, values)
    if text is None:
        return None
    if not re.fullmatch(_PATTERN, text, re.ASCII) or float(text) == 0.0:
        raise RequestError(
            f"{ROUTER_TEMPERATURE_HEADER} is {text[:80]!r}; send a number above 0 with at most two"
            " decimals, such as 0.8"
        )
    return float(text)
