"""Model name and header -> pool: every spelling, every contradiction."""

from __future__ import annotations

import pytest

from emo_serve.errors import ConfigError, PoolConflict, PoolFileError, RequestError
from emo_serve.names import (
    ModelNames,
    canonical_name,
    check_chosen,
    check_pool_name,
    is_derived,
    is_pool_name,
    is_pool_or_union,
    is_sized,
    is_union,
    join_names,
    pools_of,
    sized_name,
    split_name,
    split_size,
    with_size,
)

NAMES = ModelNames(("emo", "allenai/Emo_1b14b_1T"))


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        (None, "base"),
        ("", "base"),
        ("emo", "base"),
        ("allenai/Emo_1b14b_1T", "base"),
        ("math", "math"),
        ("emo:math", "math"),
        ("allenai/Emo_1b14b_1T:math", "math"),
        ("emo:base", "base"),
        ("math+code", "code+math"),
        ("emo:code+math+code", "code+math"),
        ("math@8", "math@8"),
        ("emo:math@8", "math@8"),
        ("math@8+code@4+math@8", "code@4+math@8"),
        ("emo@8", "emo@8"),
        ("gpt-4", "gpt-4"),
        ("emo:", ""),
        ("other:math", "other:math"),
        ("auto", "auto"),
        ("emo:auto", "auto"),
    ],
)
def test_a_model_name_means_one_pool(model: str | None, pool: str) -> None:
    assert NAMES.choose(model) == pool


def test_a_name_of_the_model_may_look_like_anything() -> None:
    names = ModelNames(("a:b+c",))
    assert names.choose("a:b+c") == "base"
    assert names.choose("a:b+c:math") == "math"


def test_the_default_pool_is_meant_by_the_models_name_alone() -> None:
    names = ModelNames(("emo",), default_pool="math+code")
    assert names.choose("emo") == "code+math"
    assert names.choose("emo:base") == "base"
    assert names.choose("emo", ["law"]) == "law"


@pytest.mark.parametrize(
    ("model", "headers", "pool"),
    [
        ("emo", ["math"], "math"),
        (None, ["math"], "math"),
        ("emo", [" math "], "math"),
        ("emo", ["code+math"], "code+math"),
        ("emo", ["math@8+code"], "code+math@8"),
        ("code+math@8", ["math@8+code"], "code+math@8"),
        ("math", ["math"], "math"),
        ("math+code", ["code+math"], "code+math"),
        ("emo", ["math", "math"], "math"),
        ("emo", ["auto"], "auto"),
        ("auto", ["auto"], "auto"),
    ],
)
def test_the_header_names_the_pool_or_repeats_it(
    model: str | None, headers: list[str], pool: str
) -> None:
    assert NAMES.choose(model, headers) == pool


@pytest.mark.parametrize(
    ("model", "headers"),
    [
        ("math", ["code"]),
        ("math", ["math@8"]),
        ("math@8", ["math@4"]),
        ("emo", ["a", "b"]),
        ("emo:base", ["math"]),
        ("auto", ["math"]),
        ("math", ["auto"]),
    ],
)
def test_two_different_pools_are_a_conflict(model: str, headers: list[str]) -> None:
    with pytest.raises(PoolConflict, match="name the pool once"):
        NAMES.choose(model, headers)


@pytest.mark.parametrize(
    "header",
    [
        "",
        " ",
        "Math",
        "a b",
        "math+",
        "emo:math",
        "m" * 65,
        "\xe9",
        "math@",
        "math@08",
        "math@x",
        "@8",
        "a@8@4",
        "math@ 8",
    ],
)
def test_a_malformed_header_is_refused(header: str) -> None:
    with pytest.raises(RequestError, match="x-emo-pool is .*expected a pool's name"):
        NAMES.choose("emo", [header])


def test_pools_may_not_take_the_models_name_or_the_base_pools() -> None:
    NAMES.check_free(["math"])
    with pytest.raises(ConfigError, match="'emo' has the name of the model.*--served-model-name"):
        NAMES.check_free(["emo"])
    with pytest.raises(ConfigError, match="'base' is kept for all experts"):
        NAMES.check_free(["base"])
    with pytest.raises(ConfigError, match="'auto' is kept for the server's own choice.*rename"):
        NAMES.check_free(["auto"])


@pytest.mark.parametrize("name", ["auto", "auto+math", "base+auto"])
def test_where_no_pool_was_chosen_auto_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="chooses one for it, alone.*/v1/completions"):
        check_chosen(name)


def test_auto_has_no_size() -> None:
    with pytest.raises(
        RequestError, match="'auto@8' is no pool.*at the pool's own size; to choose"
    ):
        check_chosen("auto@8")
    with pytest.raises(RequestError, match="alone and not in a union"):
        check_chosen("auto@8+math")


def test_a_pool_that_was_chosen_is_not_refused() -> None:
    check_chosen("automatic+math@8")


@pytest.mark.parametrize("default", ["base", "a", "c+b"])
@pytest.mark.parametrize("name", ["base", "a", "a+b", "b+c", "a+b+c", "a+b+c+d"])
def test_every_spelling_means_the_pool_it_spells(name: str, default: str) -> None:
    names = ModelNames(("emo", "org/Emo:1"), default)
    spellings = names.spellings(name)
    assert spellings[0] == name
    assert len(set(spellings)) == len(spellings)
    assert {names.choose(spelling) for spelling in spellings} == {name}
    assert ("emo" in spellings) is (canonical_name(default) == name)


def test_a_pool_is_asked_for_with_and_without_the_models_name() -> None:
    names = ModelNames(("emo", "x"))
    assert names.spellings("a+b") == (
        *("a+b", "b+a"),
        *("emo:a+b", "emo:b+a", "x:a+b", "x:b+a"),
    )
    assert names.spellings("base") == ("base", "emo:base", "x:base", "emo", "x")
    assert len(names.spellings("a+b+c")) == 6 * 3
    assert names.spellings("a+b+c+d") == ("a+b+c+d", "emo:a+b+c+d", "x:a+b+c+d")


def test_a_union_has_one_spelling() -> None:
    assert canonical_name("b+a+b") == "a+b"
    assert canonical_name("a") == "a"


@pytest.mark.parametrize("name", ["a", "math", "a-b_c.9", "m" * 64, "auto", "a..", "-", "_."])
def test_a_pools_name_is_taken(name: str) -> None:
    assert is_pool_name(name) and is_pool_or_union(name) and not is_union(name)
    assert check_pool_name("file.json", name) == name


@pytest.mark.parametrize(
    "name", ["", "Math", "a b", "math\n", "m" * 65, "base:math", "\xe9", "a/b", ".", "..", ".a"]
)
def test_what_is_no_pools_name_is_refused_alone_and_in_a_union(name: str) -> None:
    assert not is_pool_name(name)
    assert not is_pool_or_union(name) and not is_pool_or_union(f"math+{name}")


def test_a_union_is_no_pools_name() -> None:
    assert is_union("a+b") and is_pool_or_union("a+b") and not is_pool_name("a+b")
    assert not is_pool_or_union("a+") and not is_pool_or_union("+")
    assert split_name("b+a+b") == ("b", "a"), "as ordered in it"
    assert split_name("a") == ("a",)
    assert join_names(["b", "a", "b"]) == "a+b"


def test_a_size_is_part_of_a_name() -> None:
    assert split_size("math@8") == ("math", 8)
    assert sized_name("math", 8) == "math@8"
    for whole in ("math", "math@", "math@0", "math@08", "math@+8", "math@8x", "math@123456", "@"):
        assert split_size(whole) == (whole, None)
    assert split_size("math@\u0668") == ("math@\u0668", None), "a digit, but not ours"
    assert is_sized("math@8") and is_derived("math@8") and is_pool_or_union("math@8")
    assert not is_sized("math") and not is_sized("math@8+code") and not is_sized("math@08")
    assert is_derived("math@8+code") and is_derived("a+b") and not is_derived("math")
    assert not is_pool_name("math@8")
    assert pools_of("math@8+code+math") == ("math", "code")


def test_all_pools_of_a_name_get_one_size() -> None:
    assert with_size("math", 8) == "math@8"
    assert with_size("math+code", 4) == "code@4+math@4"
    with pytest.raises(RequestError, match="'code@4' has a size already, and experts=8 gives"):
        with_size("math+code@4", 8)


@pytest.mark.parametrize("name", ["a+b", "math@8", "base:math", "Math", "", 3])
def test_a_name_no_file_may_carry_is_refused_with_value_and_rule(name: object) -> None:
    with pytest.raises(PoolFileError) as caught:
        check_pool_name("file.json", name)
    assert str(caught.value) == (
        f"file.json: name is {name!r}; expected 1 to 64 of a-z 0-9 . _ -, the first no dot"
        " ('+' is reserved for unions, '@' for sizes, ':' for base:pool)"
    )
