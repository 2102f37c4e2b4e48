"""A directory of pools: bad files cost themselves only, names resolve to pools and unions."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from emo_serve.emo.config import MoeLayer
from emo_serve.errors import ConfigError, RequestError, UnknownPool
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel

MODEL = (MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4), None)


def a_pool(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    return ExpertPool(name, (LayerExperts(experts), None), temperature)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    a_pool("math", 1, 2).write(tmp_path / "zzz.json")
    a_pool("code", 2, 3).write(tmp_path / "code.json")
    a_pool("hot", 5, temperature=2.0).write(tmp_path / "hot.json")
    return tmp_path


def test_pools_are_sorted_by_their_own_names_and_completed(directory: Path) -> None:
    catalog = PoolCatalog.read(directory, MODEL, None)
    assert list(catalog.pools) == ["code", "hot", "math"]
    assert catalog.pools["math"].expert_ids == ((1, 2, 7), ())
    assert catalog.refused == ()


def test_without_a_model_pools_are_left_as_written(directory: Path) -> None:
    assert PoolCatalog.read(directory).pools["math"].expert_ids == ((1, 2), ())


def test_refused_files_are_reported_and_the_others_served(directory: Path) -> None:
    (directory / "broken.json").write_text("{")
    a_pool("big", 8).write(directory / "big.json")
    foreign = ExpertPool("foreign", (LayerExperts((1,)), None), model=PoolModel(fingerprint="x"))
    foreign.write(directory / "foreign.json")
    (directory / "folder.json").mkdir()
    (directory / "notes.txt").write_text("not a pool")
    (directory / ".hidden.json").write_text("not a pool")
    catalog = PoolCatalog.read(directory, MODEL, "y")
    assert list(catalog.pools) == ["code", "hot", "math"]
    refused = sorted(str(error) for error in catalog.refused)
    for name, message in zip(("big", "broken", "folder", "foreign"), refused, strict=True):
        assert message.startswith(f"{directory / name}.json: ")
    assert "an id from 0 to 7" in refused[0]


def test_files_with_one_name_are_all_refused_and_name_each_other(directory: Path) -> None:
    a_pool("math", 4).write(directory / "math.json")
    catalog = PoolCatalog.read(directory, MODEL, None)
    assert list(catalog.pools) == ["code", "hot"]
    messages = [str(error) for error in catalog.refused]
    assert len(messages) == 2
    assert all("math.json" in text and "zzz.json" in text for text in messages)


def test_one_file_is_a_catalog_of_one(directory: Path) -> None:
    assert list(PoolCatalog.read(directory / "zzz.json", MODEL, None).pools) == ["math"]


def test_an_absent_directory_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent does not exist"):
        PoolCatalog.read(tmp_path / "absent", MODEL, None)
    assert PoolCatalog.read(tmp_path, MODEL, None).pools == {}


def test_a_union_is_one_object_however_it_is_written() -> None:
    catalog = PoolCatalog([a_pool("a", 1), a_pool("b", 2), a_pool("c", 3)])
    abc = catalog.resolve("a+b+c")
    assert abc.name == "a+b+c"
    assert abc.expert_ids == ((1, 2, 3), ())
    for parts in permutations("abca"):
        assert catalog.resolve("+".join(parts)) is abc
    assert catalog.resolve("a") is catalog.pools["a"]
    assert catalog.resolve("a+a") is catalog.pools["a"]


@pytest.mark.parametrize("name", ["law", "math+law", "", "math+", "+", "MATH", "base:math"])
def test_an_unknown_name_is_refused_with_the_names_there_are(directory: Path, name: str) -> None:
    catalog = PoolCatalog.read(directory, MODEL, None)
    with pytest.raises(UnknownPool, match="the pools are: code, hot, math"):
        catalog.resolve(name)


def test_an_endless_name_is_not_repeated_in_full() -> None:
    with pytest.raises(UnknownPool) as caught:
        PoolCatalog().resolve("x" * 10**6)
    assert len(str(caught.value)) < 200


def test_a_union_across_temperatures_is_refused(directory: Path) -> None:
    with pytest.raises(RequestError, match="one router_temperature"):
        PoolCatalog.read(directory, MODEL, None).resolve("hot+math")


def test_remembered_unions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emo_serve.pools.catalog._MAX_CACHED_UNIONS", 2)
    catalog = PoolCatalog([a_pool(name, place) for place, name in enumerate("abcd")])
    kept, dropped = catalog.resolve("a+b"), catalog.resolve("a+c")
    assert catalog.resolve("b+a") is kept
    catalog.resolve("a+d")
    assert catalog.resolve("a+b") is kept
    assert catalog.resolve("a+c") is not dropped
    assert catalog.resolve("a+c") == dropped
