"""The header x-emo-min-experts."""

from __future__ import annotations

import pytest

from emo_serve.errors import RequestError
from emo_serve.server.asgi.elastic import WHOLE, wanted_min_experts


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([], None), (["4"], 4), ([" 12 "], 12), (["all"], WHOLE), (["ALL", "all"], WHOLE)],
)
def test_it_is_a_number_or_all(values: list[str], wanted: int | None) -> None:
    assert wanted_min_experts(values) == wanted


@pytest.mark.parametrize("values", [["0"], ["-1"], [""], ["04"], ["4.0"], ["none"], ["9" * 9]])
def test_anything_else_is_refused_with_what_was_expected(values: list[str]) -> None:
    with pytest.raises(RequestError, match="a whole number from 1, or 'all'"):
        wanted_min_experts(values)


def test_two_that_differ_are_refused() -> None:
    with pytest.raises(RequestError, match="two values"):
        wanted_min_experts(["4", "8"])
