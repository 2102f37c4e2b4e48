"""Strict models: what is converted (nothing), and how a refusal reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from emo_serve.errors import ConfigError, PoolFileError
from emo_serve.pools.strict_model import Expected, StrictModel, validated


class Inner(StrictModel):
    share: float = 0.5


class Outer(StrictModel):
    count: Annotated[int, Field(ge=1), Expected("one or more")] = 1
    names: Annotated[list[str], Field(min_length=1), Expected("some names")] = ["a"]
    layers: list[Inner | None] = []
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    inner: Inner = Inner()


def test_an_integer_is_a_float_and_nothing_else_is_converted() -> None:
    assert validated(Inner, "x", {"share": 1}, "it") == Inner(share=1.0)
    for value in (True, "1", None):
        with pytest.raises(PoolFileError, match="share is"):
            validated(Inner, "x", {"share": value}, "it")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "x: it is 3; expected an object"),
        ({"count": True}, "x: count is True; expected one or more"),
        ({"count": 0}, "x: count is 0; expected one or more"),
        ({"names": []}, "x: names is []; expected some names"),
        ({"names": "a"}, "x: names is 'a'; expected some names"),
        ({"names": ["a", 2]}, "x: names[1] is 2; expected a string"),
        ({"kind": "c"}, "x: kind is 'c'; expected 'a' or 'b'"),
        ({"flag": 1}, "x: flag is 1; expected true or false"),
        ({"inner": {"share": "?"}}, "x: inner.share is '?'; expected a number"),
        ({"inner": {"shape": 1}}, "x: a key of inner is 'shape'; expected one of share"),
        ({"layers": [None, {"share": "?"}]}, "x: layer 1: share is '?'; expected a number"),
        ({"layers": [3]}, "x: layer 0: the entry is 3; expected an object"),
        ({"cuont": 2}, "x: a key of it is 'cuont'; expected one of count, names, layers,"),
        ({"names": ["a", "x" * 1000, 3, 4]}, "x: names[2] is 3"),
    ],
)
def test_a_refusal_names_place_field_value_and_expectation(value: Any, message: str) -> None:
    with pytest.raises(PoolFileError) as caught:
        validated(Outer, "x", value, "it")
    assert str(caught.value).startswith(message)


def test_the_caller_says_which_error_it_is() -> None:
    with pytest.raises(ConfigError, match="^line 3: the text is 4; expected an object$"):
        validated(Inner, "line 3", 4, "the text", ConfigError)
