"""Pools as values: files, the hash, and the maths on random pools of random models."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.errors import ConfigError, PoolFileError, RequestError
from emo_serve.facts import MoeLayer
from emo_serve.pools.document import parse_pool, read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration, PoolModel

MODEL = (
    None,
    MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4),
    MoeLayer(num_experts=16, num_shared_experts=0, always_active=(2, 5), top_k=4),
)
SCORES = tuple(float(expert) for expert in range(8))


def a_pool(name: str = "math", **changes: Any) -> ExpertPool:
    layers = (None, LayerExperts((1, 3), SCORES), LayerExperts((0, 9)))
    return replace(ExpertPool(name, layers), **changes)


# -- strategies --


@st.composite
def models(draw: st.DrawFn) -> tuple[MoeLayer | None, ...]:
    layers: list[MoeLayer | None] = []
    for num_experts in draw(st.lists(st.integers(0, 12), min_size=1, max_size=4)):
        if num_experts == 0:
            layers.append(None)
            continue
        shared = draw(st.integers(0, min(2, num_experts)))
        always = draw(st.sets(st.integers(0, num_experts - 1), max_size=2)) if not shared else ()
        layers.append(MoeLayer(num_experts, shared, tuple(sorted(always)), min(4, num_experts)))
    return tuple(layers)


names = st.from_regex(r"[a-z0-9_-][a-z0-9._-]{0,63}", fullmatch=True)
temperatures = st.floats(0.01, 100)
texts = st.text(st.characters(exclude_categories=("Cc", "Cs")))


@st.composite
def pools_of(
    draw: st.DrawFn,
    model: tuple[MoeLayer | None, ...],
    temperature: st.SearchStrategy[float] = temperatures,
    scored: bool | None = None,
) -> ExpertPool:
    layers: list[LayerExperts | None] = []
    for layer in model:
        if layer is None:
            layers.append(None)
            continue
        ids = st.integers(0, layer.num_experts - 1)
        experts = draw(st.lists(ids, unique=True, min_size=1))
        score = st.floats(allow_nan=False, allow_infinity=False)
        scores = st.lists(score, min_size=layer.num_experts, max_size=layer.num_experts)
        has_scores = draw(st.booleans()) if scored is None else scored
        layers.append(LayerExperts(tuple(experts), tuple(draw(scores)) if has_scores else None))
    implied = tuple(() if layer is None else tuple(sorted(layer.implied)) for layer in model)
    text = st.none() | texts
    made_for = st.none() | st.builds(PoolModel, text, text, st.sampled_from([None, implied]))
    count = st.none() | st.integers(0, 10**12)
    are_scored = all(layer is None or layer.scores is not None for layer in layers)
    return ExpertPool(
        default_experts=draw(st.none() | st.integers(1, 2**16)) if are_scored else None,
        name=draw(names),
        layers=tuple(layers),
        router_temperature=draw(temperature),
        description=draw(texts),
        model=draw(made_for),
        calibration=draw(st.none() | st.builds(PoolCalibration, texts, count, count, count, count)),
    )


@st.composite
def model_and_pools(
    draw: st.DrawFn, count: int, scored: bool | None = None
) -> tuple[tuple[MoeLayer | None, ...], list[ExpertPool]]:
    """Draw a model and pools of one temperature that fit it."""
    model = draw(models())
    temperature = st.just(draw(temperatures))
    pools = [draw(pools_of(model, temperature, scored)) for _ in range(count)]
    return model, pools


def layer_sets(pool: ExpertPool) -> list[set[int]]:
    return [set(ids) for ids in pool.expert_ids]


# -- file --


@settings(max_examples=40)
@given(model_and_pools(1))
def test_a_file_gives_back_the_pool_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Any, list[ExpertPool]]
) -> None:
    model, (pool,) = drawn
    path = tmp_path_factory.mktemp("pools") / "pool.json"
    write_pool(pool, path)
    read = read_pool(path)
    assert read == pool
    assert read.content_hash == pool.content_hash
    read.check_fits(model, None, str(path))
    assert list(path.parent.iterdir()) == [path]


# -- in memory --


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerExperts((1, 1)), "each id once"),
        (LayerExperts((-1,)), "an id of 0 or more"),
        (LayerExperts((True,)), "an id of 0 or more"),
        (LayerExperts((3,), (0.0, 1.0)), "at least 4"),
        (LayerExperts((0,), (float("nan"),)), "a finite number"),
    ],
)
def test_a_pool_built_in_memory_is_checked_too(layer: LayerExperts, message: str) -> None:
    with pytest.raises(PoolFileError, match=f"pool 'p': layer 1: .*{message}"):
        ExpertPool("p", (None, layer))


def test_an_impossible_temperature_is_refused_in_memory() -> None:
    with pytest.raises(PoolFileError, match="router_temperature is 0"):
        a_pool(router_temperature=0)


# -- hash --


@settings(max_examples=50)
@given(model_and_pools(1), st.randoms())
def test_the_hash_ignores_order_name_scores_and_provenance(
    drawn: tuple[Any, list[ExpertPool]], random: Any
) -> None:
    _, (pool,) = drawn
    layers = []
    for layer in pool.layers:
        shuffled = list(layer.experts) if layer else []
        random.shuffle(shuffled)
        layers.append(LayerExperts(tuple(shuffled)) if layer else None)
    other = ExpertPool("other", tuple(layers), pool.router_temperature)
    assert other.content_hash == pool.content_hash


@settings(max_examples=50)
@given(model_and_pools(2))
def test_the_hash_is_equal_exactly_when_the_experts_are(
    drawn: tuple[Any, list[ExpertPool]],
) -> None:
    _, (one, two) = drawn
    assert (one.content_hash == two.content_hash) == (one.expert_ids == two.expert_ids)


@given(temperatures, temperatures)
def test_the_hash_tells_temperatures_apart(one: float, two: float) -> None:
    hashes = {a_pool(router_temperature=value).content_hash for value in (one, two)}
    assert len(hashes) == len({one, two})


def test_the_hash_is_a_fixed_function_of_the_content() -> None:
    """Prefix caches may outlive a process; a change here must be deliberate."""
    hashed = b'["emo-pool/1",[null,[1,3],[0,9]],1.0]'
    assert a_pool(router_temperature=1).content_hash == hashlib.sha256(hashed).hexdigest()


def test_the_hash_tells_a_dense_layer_from_an_empty_one() -> None:
    empty = ExpertPool("p", (LayerExperts(()),))
    assert empty.content_hash != ExpertPool("p", (None,)).content_hash


# -- complete, union, cut, base --


@given(model_and_pools(1))
def test_completing_adds_what_the_model_implies_and_no_more(
    drawn: tuple[tuple[MoeLayer | None, ...], list[ExpertPool]],
) -> None:
    model, (pool,) = drawn
    complete = pool.complete(model)
    implied = [layer.implied if layer else frozenset() for layer in model]
    assert layer_sets(complete) == [a | b for a, b in zip(layer_sets(pool), implied, strict=True)]
    assert complete.complete(model) == complete
    assert (complete.name, complete.model) == (pool.name, pool.model)


@settings(max_examples=50)
@given(model_and_pools(3))
def test_union_is_idempotent_commutative_and_associative(
    drawn: tuple[Any, list[ExpertPool]],
) -> None:
    _, (a, b, c) = drawn
    a, b, c = replace(a, name="a"), replace(b, name="b"), replace(c, name="c")
    union = a.union(b)
    assert layer_sets(union) == [x | y for x, y in zip(layer_sets(a), layer_sets(b), strict=True)]
    assert union == b.union(a)
    assert union.name == "a+b"
    assert a.union(a).content_hash == a.content_hash
    assert a.union(a).name == "a"
    assert a.union(b.union(c)).content_hash == a.union(b).union(c).content_hash
    assert a.union(b.union(c)).name == "a+b+c"


@settings(max_examples=50)
@given(model_and_pools(2))
def test_union_and_completion_commute(drawn: tuple[Any, list[ExpertPool]]) -> None:
    model, (a, b) = drawn
    late = a.union(b).complete(model)
    assert a.complete(model).union(b.complete(model)).content_hash == late.content_hash


def test_a_unions_name_is_sorted() -> None:
    union = a_pool("h")
    for name in "cgaebdf":
        union = a_pool(name).union(union)
    assert union.name == "a+b+c+d+e+f+g+h"


def test_pools_of_different_temperatures_do_not_unite() -> None:
    with pytest.raises(RequestError, match=r"'math' and 'hot' cannot be united.*1\.0 and 2\.0"):
        a_pool().union(a_pool("hot", router_temperature=2))


def test_pools_of_different_models_do_not_unite() -> None:
    with pytest.raises(RequestError, match="models of different layers"):
        a_pool().union(ExpertPool("other", (LayerExperts((1,)),)))


@given(model_and_pools(1, scored=True), st.integers(1, 14))
def test_a_cut_keeps_the_implied_and_the_best_scored(
    drawn: tuple[tuple[MoeLayer | None, ...], list[ExpertPool]], k: int
) -> None:
    model, (pool,) = drawn
    if any(layer and len(layer.implied) > k for layer in model):
        with pytest.raises(ConfigError, match="needs at least"):
            pool.cut(k, model)
        return
    cut = pool.cut(k, model)
    for mine, layer in zip(cut.layers, model, strict=True):
        if layer is None or mine is None:
            assert mine is None
            continue
        assert mine.scores is not None
        assert len(mine.experts) == min(k, layer.num_experts)
        assert layer.implied <= set(mine.experts)
        left_out = set(range(layer.num_experts)) - set(mine.experts)
        chosen = set(mine.experts) - layer.implied
        worst = min((mine.scores[expert] for expert in chosen), default=float("inf"))
        assert all(mine.scores[expert] <= worst for expert in left_out)
    assert cut.cut(k, model) == cut
    assert pool.cut(14, model).cut(k, model) == cut


def test_equal_scores_go_to_the_lower_id() -> None:
    model = (MoeLayer(6, 1, (), 2),)
    pool = ExpertPool("p", (LayerExperts((4,), (1.0, 2.0, 2.0, 1.0, 2.0, 0.0)),))
    assert pool.cut(3, model).expert_ids == ((1, 2, 5),)
    assert pool.cut(5, model).expert_ids == ((0, 1, 2, 4, 5),)


def test_a_pool_without_scores_cannot_be_cut() -> None:
    with pytest.raises(PoolFileError, match="layer 2: scores is None; expected a number for each"):
        a_pool().cut(4, MODEL)


def test_the_base_pool_has_every_expert() -> None:
    base = ExpertPool.base(MODEL)
    assert base.expert_ids == ((), tuple(range(8)), tuple(range(16)))
    assert base.name == "base"
    assert base.complete(MODEL) == base


# -- fit --


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (
            ExpertPool("p", (None,)),
            "the number of layers is 1; expected one per layer of the model",
        ),
        (
            ExpertPool("p", (LayerExperts((1,)), LayerExperts((1,)), LayerExperts((1,)))),
            r"layer 0: experts is \[1\]; expected null: the layer is dense",
        ),
        (
            ExpertPool("p", (None, None, LayerExperts((1,)))),
            "layer 1: the entry is None; expected experts: the layer has 8",
        ),
        (
            ExpertPool("p", (None, LayerExperts((8,)), LayerExperts((1,)))),
            "layer 1: an expert is 8; expected an id from 0 to 7",
        ),
        (
            ExpertPool("p", (None, LayerExperts((1,), (0.0,) * 9), LayerExperts((1,)))),
            "layer 1: the number of scores is 9; expected one for each expert of the layer, 8",
        ),
        (a_pool(model=PoolModel("m", "abc")), "model.fingerprint is 'abc'; expected .*'fed'"),
    ],
)
def test_a_pool_of_another_model_is_refused(pool: ExpertPool, message: str) -> None:
    with pytest.raises(PoolFileError, match=f"^file.json: {message}"):
        pool.check_fits(MODEL, "fed", "file.json")


def test_a_layer_may_be_left_to_the_implied_experts_but_not_empty() -> None:
    pool = ExpertPool("p", (LayerExperts(()),))
    shared = (MoeLayer(8, 1, (), 4),)
    pool.check_fits(shared, None, "file.json")
    assert pool.complete(shared).expert_ids == ((7,),)
    with pytest.raises(PoolFileError, match=r"layer 0: experts is \[\]; expected at least one"):
        pool.check_fits((MoeLayer(8, 0, (), 4),), None, "file.json")


def test_a_fingerprint_is_checked_only_where_both_sides_have_one() -> None:
    a_pool().check_fits(MODEL, "fed", "file.json")
    a_pool(model=PoolModel("m", "fed")).check_fits(MODEL, "fed", "file.json")
    a_pool(model=PoolModel("m", "abc")).check_fits(MODEL, None, "file.json")


def test_maths_refuses_a_pool_that_does_not_fit() -> None:
    with pytest.raises(PoolFileError, match="pool 'math': the number of layers"):
        a_pool().complete(MODEL[:2])


# -- what a file says of its model --


IMPLIED = ((), (7,), (2, 5))


def test_a_file_that_names_the_implied_experts_is_cut_without_the_model(tmp_path: Path) -> None:
    scores = tuple(float(expert) for expert in range(16))
    layers = (None, LayerExperts((1, 3), SCORES), LayerExperts((0, 9), scores))
    pool = ExpertPool("math", layers, model=PoolModel(implied=IMPLIED))
    write_pool(pool, tmp_path / "p.json")
    read = read_pool(tmp_path / "p.json")
    assert read == pool
    assert read.cut(4) == read.cut(4, MODEL)
    assert read.cut(3).expert_ids == ((), (5, 6, 7), (2, 5, 15))
    with pytest.raises(ConfigError, match="layer 2 needs at least 2"):
        read.cut(1)


def test_without_model_and_record_nothing_is_cut() -> None:
    with pytest.raises(
        PoolFileError, match=r"model\.implied is None; expected .* cut with the model"
    ):
        a_pool().cut(4)


@pytest.mark.parametrize(
    ("implied", "message"),
    [
        ("all", "model.implied is 'all'; expected a list with one list of ids per layer"),
        ([[], [7]], "the number of lists in model.implied is 2; expected one list per layer, 3"),
        ([[], 7, []], "layer 1: model.implied is 7; expected ids of 0 or more, each once"),
        (
            [[], [7, 7], []],
            "layer 1: model.implied is [7, 7]; expected ids of 0 or more, each once",
        ),
        ([[], [-1], []], "layer 1: model.implied is [-1]"),
        ([[], [True], []], "layer 1: model.implied is [True]"),
        ([[0], [7], []], "layer 0: model.implied is [0]; expected []: the layer is dense"),
        ([[], [8], []], "layer 1: model.implied is [8]; expected ids below 8"),
    ],
)
def test_a_bad_record_of_implied_experts_is_refused(implied: object, message: str) -> None:
    layers = [None, {"experts": [1], "scores": list(SCORES)}, {"experts": [2]}]
    document = {"format": "emo-pool/1", "name": "p", "layers": layers}
    parse_pool("p", {**document, "model": {"implied": [[], [7], [2, 5]]}})
    with pytest.raises(PoolFileError) as caught:
        parse_pool("p", {**document, "model": {"implied": implied}})
    assert message in str(caught.value)


def test_a_record_that_is_not_the_models_is_refused() -> None:
    a_pool(model=PoolModel(implied=IMPLIED)).check_fits(MODEL, None, "p")
    other = a_pool(model=PoolModel(implied=((), (6,), (2, 5))))
    with pytest.raises(PoolFileError, match=r"layer 1: model\.implied is \[6\]; .* \[7\]"):
        other.check_fits(MODEL, None, "p")


def test_a_file_keeps_seed_and_size_of_its_calibration(tmp_path: Path) -> None:
    made = PoolCalibration("layerwise", 20, 5120, seed=3, experts=16)
    write_pool(a_pool(calibration=made), tmp_path / "p.json")
    assert read_pool(tmp_path / "p.json").calibration == made
    for key in ("seed", "experts"):
        document = {"format": "emo-pool/1", "name": "p", "layers": [None]}
        with pytest.raises(PoolFileError, match=f"calibration.{key} is -1"):
            parse_pool("p", {**document, "calibration": {"method": "m", key: -1}})
