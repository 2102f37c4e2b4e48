"""Every kind of request means one pool, or anything; nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cluster.asked import ANYTHING, Asked, read_asked
from emo_serve.names import AUTO_POOL, ModelNames, split_name

NAMES = ModelNames(("emo", "org/emo"))
POOLS = ("math", "code", "law")


@pytest.mark.parametrize(
    ("model", "headers", "name"),
    [
        ("math", (), "math"),
        ("emo:math", (), "math"),
        ("org/emo:code+math", (), "code+math"),
        ("math+code+math", (), "code+math"),
        ("emo:math@4", (), "math@4"),
        ("math@4+code", (), "code+math@4"),
        ("emo", ("math@4",), "math@4"),
        ("math@4+base", (), "base"),
        ("base@4", (), ""),
        ("auto@4", (), ""),
        ("physics@4", (), ""),
        ("emo", (), "base"),
        (None, (), "base"),
        ("", (), "base"),
        ("base", (), "base"),
        ("math+base", (), "base"),
        ("emo", ("math",), "math"),
        ("math", ("math",), "math"),
        ("code+math", ("math+code",), "code+math"),
        (None, ("law",), "law"),
        ("auto", (), ""),
        ("emo:auto", (), ""),
        ("emo", ("auto",), ""),
        ("math+auto", (), ""),
        ("physics", (), ""),
        ("math+physics", (), ""),
        ("gpt-4/o", (), ""),
        ("math", ("law",), ""),
        ("emo", ("math", "law"), ""),
        ("emo", ("Not A Pool",), ""),
        ("+", (), ""),
        (7, (), ""),
        (["math"], (), ""),
        ({"math": 1}, ("math",), ""),
    ],
)
def test_each_kind_of_name_is_defined(model: Any, headers: tuple[str, ...], name: str) -> None:
    asked = read_asked(NAMES, POOLS, model, headers)
    assert asked == (Asked(name, split_name(name)) if name else ANYTHING)
    assert asked.is_anything is (name == "")


def test_the_default_pool_is_meant_by_the_models_name() -> None:
    for default, name in (("math", "math"), ("law+code", "code+law"), (AUTO_POOL, "")):
        assert read_asked(ModelNames(("emo",), default), POOLS, "emo").name == name


def test_without_a_list_of_pools_every_possible_name_counts() -> None:
    assert read_asked(NAMES, None, "physics").name == "physics"
    assert read_asked(NAMES, None, "gpt-4/o") == ANYTHING


@given(
    st.one_of(st.none(), st.integers(), st.text(), st.from_regex(r"[a-z+:]{0,12}")),
    st.lists(st.text(max_size=8), max_size=2),
)
def test_whatever_is_sent_is_read(model: object, headers: list[str]) -> None:
    asked = read_asked(NAMES, None, model, headers)
    assert asked.is_anything or asked.parts == split_name(asked.name)
