"""A pool at other sizes: what `NAME@K` has, what a bare name stands for, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cli.main import main
from emo_serve.errors import PoolFileError, RequestError, UnknownPool
from emo_serve.facts import MoeLayer
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel
from emo_serve.pools.sizes import at_size, served_pool, sizes_of

MODEL = (
    None,
    MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4),
    MoeLayer(num_experts=16, num_shared_experts=0, always_active=(2, 5), top_k=4),
)
IMPLIED = PoolModel(implied=((), (7,), (2, 5)))


def scored(name: str = "math", step: int = 3) -> ExpertPool:
    """Return a pool of four experts per layer, with scores in some order that `step` decides."""
    layers = [
        LayerExperts((0, 1, 2, 3), tuple(float(step * e % 17) for e in range(layer.num_experts)))
        for layer in MODEL
        if layer is not None
    ]
    return ExpertPool(name, (None, *layers), model=IMPLIED)


def scoreless(name: str) -> ExpertPool:
    return ExpertPool(name, (None, LayerExperts((1,)), LayerExperts((1,))))


def catalog_of(*pools: ExpertPool, default_experts: int | None = None) -> PoolCatalog:
    catalog = PoolCatalog((), MODEL, default_experts=default_experts)
    for pool in pools:
        catalog.add(pool)
    return catalog


# -- sizes --


def test_sizes_go_from_what_every_pool_has_to_all_experts() -> None:
    assert sizes_of(scored(), MODEL) == range(2, 17)
    assert sizes_of(scored()) == range(2, 17), "the file says what is implied"
    assert sizes_of(scoreless("law"), MODEL) is None
    half = replace(scored(), layers=(None, scored().layers[1], LayerExperts((1,))))
    assert sizes_of(half, MODEL) is None
    assert sizes_of(ExpertPool("dense", (None,)), (None,)) is None
    with pytest.raises(PoolFileError, match="cut with the model"):
        sizes_of(replace(scored(), model=None))


@pytest.mark.parametrize("k", range(2, 17))
def test_a_size_is_what_the_cut_file_has(
    tmp_path: Path, k: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pool(scored(), tmp_path / "math.json")
    arguments = ["--experts", str(k), "--out", str(tmp_path / "cut.json")]
    assert main(["pools", "cut", str(tmp_path / "math.json"), *arguments]) == 0
    cut = catalog_of(read_pool(tmp_path / "cut.json")).pools[f"math-{k}"]
    sized = catalog_of(scored()).resolve(f"math@{k}")
    assert sized.name == f"math@{k}"
    assert sized.content_hash == cut.content_hash
    assert sized.description == cut.description
    assert all(layer is None or layer.scores is None for layer in sized.layers)


@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 16))
def test_sizes_are_nested(a: int, b: int, step: int) -> None:
    small, large = sorted((a, b))
    pool = scored(step=step)
    for inner, outer in zip(
        at_size(pool, small, MODEL).expert_ids,
        at_size(pool, large, MODEL).expert_ids,
        strict=True,
    ):
        assert set(inner) <= set(outer)


def test_a_size_keeps_the_temperature() -> None:
    assert at_size(replace(scored(), router_temperature=2.0), 4, MODEL).router_temperature == 2.0


# -- names --


def test_sizes_unite_like_pools_however_they_are_written() -> None:
    catalog = catalog_of(scored(), scored("code", 5))
    union = catalog.resolve("math@8+code@4")
    assert union is catalog.resolve("code@4+math@8+code@4")
    assert union.name == "code@4+math@8"
    parts = catalog.resolve("math@8"), catalog.resolve("code@4")
    assert union.content_hash == parts[0].union(parts[1]).content_hash
    assert catalog.resolve("math@8") is parts[0]
    assert catalog.resolve("math@8+math@4").content_hash == parts[0].content_hash
    assert catalog.resolve("math+code@4").name == "code@4+math"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "math@1",
            "no pool 'math@1': the sizes of pool 'math' are 2 to 16 experts per layer, from",
        ),
        ("math@17", "from 'math@2' to 'math@16'"),
        ("math@99999", "no pool 'math@99999': the sizes"),
        ("math@0", "no pool 'math@0': the sizes"),
        ("math@08", "no pool 'math@08': the sizes"),
        ("math@", "no pool 'math@': the sizes"),
        ("math@x", "no pool 'math@x': the sizes"),
        ("math@-4", "no pool 'math@-4': the sizes"),
        ("code+math@99", "no pool 'math@99': the sizes"),
        (
            "math@4@4",
            r"no pool 'math@4@4' \(did you mean 'math'\?\); the pools are: code, law, math",
        ),
        ("nope@4", "no pool 'nope@4'; the pools are: code, law, math"),
        ("@4", "no pool '@4'; the pools are"),
        ("law@4", "no pool 'law@4': pool 'law' has no scores by which.*with sizes are: code, math"),
    ],
)
def test_a_size_there_is_not_is_refused_with_those_there_are(name: str, message: str) -> None:
    catalog = catalog_of(scored(), scored("code", 5), scoreless("law"))
    with pytest.raises(UnknownPool, match=message):
        catalog.resolve(name)


def test_what_was_made_of_a_pool_goes_with_its_definition() -> None:
    catalog = catalog_of(scored(), scored("code", 5))
    old, other = catalog.resolve("math@4+code@4"), catalog.resolve("code@4")
    catalog.add(scored(step=7), replace=True)
    assert catalog.resolve("math@4+code@4").content_hash != old.content_hash
    assert catalog.resolve("code@4") is other
    catalog.remove("math")
    for name in ("math@4", "math@4+code@4"):
        with pytest.raises(UnknownPool, match="the pools are: code"):
            catalog.resolve(name)


def test_a_size_is_not_removed_or_defined() -> None:
    catalog = catalog_of(scored())
    with pytest.raises(UnknownPool, match="'math@4' has no definition of its own: it is a size"):
        catalog.remove("math@4")
    with pytest.raises(PoolFileError, match="name is 'math@4'.*'@' for sizes"):
        catalog.add(scored("math@4"))


def test_a_definition_can_be_tried() -> None:
    catalog = catalog_of(scored(), scored("code", 5))
    changed = catalog_of(scored(step=7)).resolve("math@4")
    assert catalog.resolve_with("math@4", scored(step=7)).content_hash == changed.content_hash
    with pytest.raises(UnknownPool, match="pool 'math' has no scores"):
        catalog.resolve_with("code+math@4", scoreless("math"))
    with pytest.raises(RequestError, match="router_temperature"):
        catalog.resolve_with("code+math@4", replace(scored(), router_temperature=2.0))


# -- default sizes --


def test_a_bare_name_stands_for_the_default_size() -> None:
    own = replace(scored(), default_experts=4)
    catalog = catalog_of(own, scored("code"), scoreless("law"))
    assert catalog.pools["math"].expert_ids == catalog.resolve("math@4").expert_ids
    assert list(map(len, catalog.resolve("math@12").expert_ids)) == [0, 8, 12], "all are still had"
    assert catalog.pools["code"].expert_ids == scored().complete(MODEL).expert_ids
    catalog = catalog_of(own, scored("code"), scoreless("law"), default_experts=6)
    assert catalog.pools["math"].expert_ids == catalog.resolve("math@4").expert_ids
    assert catalog.pools["code"].expert_ids == catalog.resolve("code@6").expert_ids
    assert catalog.pools["law"].expert_ids == scoreless("law").complete(MODEL).expert_ids


def test_a_default_size_may_be_larger_than_what_the_file_lists() -> None:
    pool = catalog_of(replace(scored(), default_experts=16)).pools["math"]
    assert list(map(len, pool.expert_ids)) == [0, 8, 16]


def test_a_stored_pool_keeps_its_default_and_all_that_it_lists(tmp_path: Path) -> None:
    pool = replace(scored(), default_experts=4)
    catalog = PoolCatalog.read(tmp_path, MODEL, persists=True)
    catalog.add(pool)
    assert read_pool(tmp_path / "math.json") == pool
    assert PoolCatalog.read(tmp_path, MODEL).pools == catalog.pools


def test_a_cut_pool_is_served_as_it_was_cut() -> None:
    cut = replace(scored(), default_experts=4).cut(8, MODEL)
    assert cut.default_experts is None
    assert served_pool(cut, MODEL, "x").expert_ids == cut.expert_ids


@pytest.mark.parametrize(("k", "bounds"), [(1, "2 to 16"), (17, "2 to 16")])
def test_a_default_that_the_model_does_not_allow_costs_the_file(
    tmp_path: Path, k: int, bounds: str
) -> None:
    write_pool(replace(scored(), default_experts=k), tmp_path / "math.json")
    (refused,) = PoolCatalog.read(tmp_path, MODEL).refused
    assert str(refused) == (
        f"{tmp_path}/math.json: default_experts is {k}; expected {bounds}, the sizes that the"
        " model allows"
    )


def test_a_default_needs_scores() -> None:
    with pytest.raises(PoolFileError, match="default_experts is 4; expected no such key: a layer"):
        replace(scoreless("law"), default_experts=4)
