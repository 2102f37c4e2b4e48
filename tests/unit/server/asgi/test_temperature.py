"""The header x-emo-router-temperature."""

from __future__ import annotations

import pytest

from emo_serve.errors import RequestError
from emo_serve.server.asgi.temperature import wanted_temperature


@pytest.mark.parametrize(
    ("values", "wanted"), [([], None), (["0.8"], 0.8), ([" 1 "], 1.0), (["12.25", "12.25"], 12.25)]
)
def test_it_is_a_number(values: list[str], wanted: float | None) -> None:
    assert wanted_temperature(values) == wanted


@pytest.mark.parametrize("value", ["0", "0.00", "-1", "", "1e3", "nan", "0.123", "1000", "\u0661"])
def test_anything_else_is_refused_with_what_was_expected(value: str) -> None:
    with pytest.raises(RequestError, match="a number above 0 with at most two decimals"):
        wanted_temperature([value])


def test_two_that_differ_are_refused() -> None:
    with pytest.raises(RequestError, match="two values"):
        wanted_temperature(["0.8", "0.9"])
