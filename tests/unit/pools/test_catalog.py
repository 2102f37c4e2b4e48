"""A directory of pools: bad files cost themselves only, names resolve to pools and unions."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import reduce
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emo_serve.errors import (
    ConfigError,
    PoolExists,
    PoolFileError,
    PoolStoreError,
    RequestError,
    StateConflict,
    UnknownPool,
)
from emo_serve.facts import MoeLayer
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel

MODEL = (MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4), None)


def a_pool(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    return ExpertPool(name, (LayerExperts(experts), None), temperature)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_pool(a_pool("math", 1, 2), tmp_path / "zzz.json")
    write_pool(a_pool("code", 2, 3), tmp_path / "code.json")
    write_pool(a_pool("hot", 5, temperature=2.0), tmp_path / "hot.json")
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
    write_pool(a_pool("big", 8), directory / "big.json")
    foreign = ExpertPool("foreign", (LayerExperts((1,)), None), model=PoolModel(fingerprint="x"))
    write_pool(foreign, directory / "foreign.json")
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
    write_pool(a_pool("math", 4), directory / "math.json")
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
    monkeypatch.setattr("emo_serve.pools.derived._MAX_REMEMBERED", 2)
    catalog = PoolCatalog([a_pool(name, place) for place, name in enumerate("abcd")])
    kept, dropped = catalog.resolve("a+b"), catalog.resolve("a+c")
    assert catalog.resolve("b+a") is kept
    catalog.resolve("a+d")
    assert catalog.resolve("a+b") is kept
    assert catalog.resolve("a+c") is not dropped
    assert catalog.resolve("a+c") == dropped


# -- changes at run time --


def files_in(directory: Path) -> dict[str, str]:
    """Return every file there, hidden ones included, with its text."""
    return {file.name: file.read_text() for file in directory.iterdir()}


@pytest.fixture
def stored(directory: Path) -> PoolCatalog:
    return PoolCatalog.read(directory, MODEL, "fed", persists=True)


def reread(directory: Path) -> PoolCatalog:
    return PoolCatalog.read(directory, MODEL, "fed", persists=True)


def test_an_added_pool_is_completed_in_memory_and_stored_as_given(
    stored: PoolCatalog, directory: Path
) -> None:
    stored.add(a_pool("law", 4))
    assert list(stored.pools) == ["code", "hot", "law", "math"]
    assert stored.resolve("law").expert_ids == ((4, 7), ())
    assert read_pool(directory / "law.json") == a_pool("law", 4)
    assert reread(directory).pools == stored.pools
    assert (stored.persists, stored.is_stored("law"), stored.version("law")) == (True, True, 1)


def test_a_redefinition_goes_to_the_file_the_pool_came_from(
    stored: PoolCatalog, directory: Path
) -> None:
    before = set(files_in(directory))
    with pytest.raises(PoolExists, match="'math' is defined already; give replace=true"):
        stored.add(a_pool("math", 5))
    stored.add(a_pool("math", 5), replace=True)
    assert read_pool(directory / "zzz.json") == a_pool("math", 5)
    assert set(files_in(directory)) == before
    assert stored.version("math") == 2


def test_a_removed_pool_takes_its_file_along_and_may_come_back(
    stored: PoolCatalog, directory: Path
) -> None:
    stored.remove("math")
    assert not (directory / "zzz.json").exists()
    assert list(reread(directory).pools) == list(stored.pools) == ["code", "hot"]
    with pytest.raises(UnknownPool, match="the pools are: code, hot"):
        stored.remove("math")
    stored.add(a_pool("math", 1))
    assert (directory / "math.json").exists()
    assert stored.version("math") == 2
    (directory / "math.json").unlink()
    stored.remove("math")  # what was to go is gone
    assert "math" not in stored.pools


def test_unions_of_a_changed_pool_are_formed_anew(stored: PoolCatalog) -> None:
    before, kept = stored.resolve("code+math"), a_pool("law", 4)
    stored.add(kept)
    other = stored.resolve("code+law")
    stored.add(a_pool("math", 6), replace=True)
    assert stored.resolve("code+math").expert_ids == ((2, 3, 6, 7), ())
    assert stored.resolve("code+math") is not before
    assert stored.resolve("code+law") is other
    stored.remove("math")
    with pytest.raises(UnknownPool):
        stored.resolve("code+math")


@pytest.mark.parametrize("shipped", [True, False])
def test_without_a_directory_of_its_own_nothing_is_written(directory: Path, shipped: bool) -> None:
    before = files_in(directory)
    path = directory if shipped else directory / "zzz.json"
    catalog = PoolCatalog.read(path, MODEL, None, persists=not shipped)
    assert not catalog.persists
    assert catalog.is_stored("math")  # a restart reads it again
    catalog.add(a_pool("law", 4))
    catalog.add(a_pool("math", 5), replace=True)
    assert not catalog.is_stored("law") and not catalog.is_stored("math")
    catalog.remove("math")
    assert "law" in catalog.pools and "math" not in catalog.pools
    assert files_in(directory) == before


def test_a_directory_that_cannot_be_written_is_read_all_the_same(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("emo_serve.pools.catalog.logger.propagate", True)
    catalog = reread(directory)
    assert len(catalog.pools) == 3 and not catalog.persists
    assert "cannot be written" in caplog.text


def test_a_failed_write_leaves_everything_as_it_was(
    stored: PoolCatalog, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    union, before, pools = stored.resolve("code+math"), files_in(directory), dict(stored.pools)

    monkeypatch.setattr(os, "fsync", _fail)
    for name, replace in (("law", False), ("math", True)):
        with pytest.raises(PoolStoreError, match=f"{name}.*Input/output error"):
            stored.add(a_pool(name, 4), replace=replace)
    monkeypatch.setattr(Path, "unlink", _fail)
    with pytest.raises(PoolStoreError, match="'math' is not removed.*Input/output error"):
        stored.remove("math")
    assert stored.pools == pools
    assert files_in(directory) == before
    assert stored.version("math") == 1 and stored.resolve("code+math") is union


def test_a_pool_that_does_not_fit_the_model_changes_nothing(
    stored: PoolCatalog, directory: Path
) -> None:
    before = files_in(directory)
    foreign = ExpertPool("law", (LayerExperts((1,)), None), model=PoolModel(fingerprint="other"))
    for bad, message in (
        (a_pool("law", 8), "pool 'law': layer 0: an expert is 8; expected an id from 0 to 7"),
        (ExpertPool("law", (LayerExperts((1,)),)), "pool 'law': the number of layers is 1"),
        (foreign, "pool 'law': model.fingerprint is 'other'"),
    ):
        with pytest.raises(PoolFileError, match=message):
            stored.add(bad)
    assert files_in(directory) == before


@pytest.mark.parametrize(
    "name", ["a+b", "base:math", "../up", "/etc/x", "a/b", "", "UP", "x" * 65, "a\nb", "a\x00"]
)
def test_no_name_leads_out_of_the_directory(
    stored: PoolCatalog, directory: Path, name: str
) -> None:
    before = files_in(directory)
    with pytest.raises(PoolFileError, match="name is"):
        stored.add(a_pool(name, 1), replace=True)
    assert files_in(directory) == before


@pytest.mark.parametrize("name", [".", "..", ".hidden", "...", ".json"])
@pytest.mark.parametrize("persists", [True, False])
def test_a_name_that_begins_with_a_dot_is_no_pools(
    directory: Path, name: str, persists: bool
) -> None:
    catalog = PoolCatalog.read(directory, MODEL, "fed", persists=persists)
    before = files_in(directory)
    with pytest.raises(PoolFileError, match="name is .* the first no dot"):
        catalog.add(a_pool(name, 1))
    assert files_in(directory) == before


def test_a_file_whose_pool_begins_with_a_dot_is_reported(directory: Path) -> None:
    text = (directory / "zzz.json").read_text().replace('"math"', '".."')
    (directory / "dots.json").write_text(text)
    (error,) = reread(directory).refused
    assert str(error).startswith(f"{directory / 'dots.json'}: name is '..'; expected")


def test_an_ending_in_capitals_is_read_too(directory: Path) -> None:
    write_pool(a_pool("upper", 1), directory / "UPPER.JSON")
    (directory / "Broken.Json").write_text("{")
    (directory / "x.json5").write_text("{")
    catalog = reread(directory)
    assert "upper" in catalog.pools
    (error,) = catalog.refused
    assert str(error).startswith(f"{directory / 'Broken.Json'}: is not UTF-8 JSON")
    catalog.add(a_pool("upper", 2), replace=True)
    assert read_pool(directory / "UPPER.JSON") == a_pool("upper", 2)
    catalog.remove("upper")
    assert not (directory / "UPPER.JSON").exists()


def test_redefining_a_linked_pool_keeps_the_link(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("elsewhere") / "law.json"
    write_pool(a_pool("law", 4), target)
    (directory / "law.json").symlink_to(target)
    catalog = reread(directory)
    catalog.add(a_pool("law", 5), replace=True)
    assert (directory / "law.json").is_symlink() and read_pool(target) == a_pool("law", 5)
    catalog.remove("law")
    assert not (directory / "law.json").is_symlink() and target.exists()


def test_a_refused_file_is_overwritten_only_when_told_to(directory: Path) -> None:
    (directory / "law.json").write_text("{")
    catalog = reread(directory)
    with pytest.raises(PoolExists, match="law.json exists but is not served"):
        catalog.add(a_pool("law", 4))
    assert (directory / "law.json").read_text() == "{"
    catalog.add(a_pool("law", 4), replace=True)
    assert catalog.refused == ()
    assert reread(directory).pools == catalog.pools


def test_a_pool_never_takes_another_ones_file(directory: Path) -> None:
    write_pool(a_pool("law", 4), directory / "poems.json")
    catalog = reread(directory)
    with pytest.raises(StateConflict, match="poems.json holds pool 'law'"):
        catalog.add(a_pool("poems", 5), replace=True)
    assert reread(directory).pools["law"].expert_ids == ((4, 7), ())


def test_a_name_two_refused_files_carry_is_not_stored_beside_them(directory: Path) -> None:
    for file in ("one.json", "two.json"):
        write_pool(a_pool("law", 4), directory / file)
    catalog = reread(directory)
    with pytest.raises(StateConflict, match="one.json, two.json have its name inside"):
        catalog.add(a_pool("law", 5), replace=True)
    for file in ("one.json", "two.json"):
        (directory / file).unlink()
    catalog.add(a_pool("law", 5))
    assert reread(directory).pools == catalog.pools


def test_a_change_is_carried_out_on_the_catalog_it_was_planned_for(stored: PoolCatalog) -> None:
    change = stored.plan_add(a_pool("law", 4))
    stored.add(a_pool("poems", 5))
    with pytest.raises(AssertionError):
        stored.commit(change)


NAMES = st.sampled_from(["a", "b", "c.d", "math"])
EXPERTS = st.sets(st.integers(0, 7), min_size=1, max_size=4)


class ChangingCatalog(RuleBasedStateMachine):
    """Any changes, some of which fail, against a dict; and what a restart would find."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        write_pool(a_pool("math", 1), self.directory / "other-name.json")
        (self.directory / "a.json").write_text("not JSON")
        self.catalog = reread(self.directory)
        self.model = {"math": a_pool("math", 1)}
        self.versions = {"math": 1}

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @rule(name=NAMES, experts=EXPERTS, replace=st.booleans(), fails=st.booleans())
    def add(self, name: str, experts: set[int], replace: bool, fails: bool) -> None:
        given = a_pool(name, *experts)
        taken = name in self.model or (self.directory / f"{name}.json").exists()
        try:
            with pytest.MonkeyPatch.context() as patch:
                if fails:
                    patch.setattr(os, "fsync", _fail)
                self.catalog.add(given, replace=replace)
        except PoolExists:
            assert taken and not replace
        except PoolStoreError:
            assert fails
        else:
            assert not fails and (replace or not taken)
            self.model[name] = given
            self.versions[name] = self.versions.get(name, 0) + 1

    @rule(name=NAMES, fails=st.booleans())
    def remove(self, name: str, fails: bool) -> None:
        try:
            with pytest.MonkeyPatch.context() as patch:
                if fails:
                    patch.setattr(Path, "unlink", _fail)
                self.catalog.remove(name)
        except UnknownPool:
            assert name not in self.model
        except PoolStoreError:
            assert fails
        else:
            assert not fails
            del self.model[name]

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def unite(self, data: st.DataObject) -> None:
        parts = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=2, unique=True))
        expected = reduce(ExpertPool.union, (self.model[part].complete(MODEL) for part in parts))
        assert self.catalog.resolve("+".join(parts)).content_hash == expected.content_hash

    @rule()
    def restart(self) -> None:
        self.catalog = reread(self.directory)
        self.versions = dict.fromkeys(self.model, 1)

    @invariant()
    def memory_is_the_model_and_the_directory(self) -> None:
        expected = {name: pool.complete(MODEL) for name, pool in sorted(self.model.items())}
        assert list(self.catalog.pools.items()) == list(expected.items())
        assert reread(self.directory).pools == expected
        assert {name: self.catalog.version(name) for name in expected} == {
            name: self.versions[name] for name in expected
        }
        assert not list(self.directory.glob(".*"))


def _fail(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


TestChangingCatalog = ChangingCatalog.TestCase
TestChangingCatalog.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # files are slow on a machine at work
)
