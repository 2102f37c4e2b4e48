"""What auto has learned of pools built here survives a restart, and goes with the pool."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from emo_serve.pools.calibration.examples import read_examples
from emo_serve.server.auto import learned
from emo_serve.server.auto.classifier import Counts, PoolClassifier, counts_of
from emo_serve.server.auto.learned import LearnedPools

TEXTS = {
    "math": ["two plus two equals four", "the sum of 3 and 4 is 7\nhalf of 18"],
    "law": ["the court finds the defendant liable", "the plaintiff may appeal \u00e9"],
}
SECRET = "defendant"


def counts(found: Mapping[str, Sequence[str] | Counts]) -> dict[str, Counts]:
    return {n: some if isinstance(some, Counts) else counts_of(some) for n, some in found.items()}


def kept_in(directory: Path, *, keeps_examples: bool) -> LearnedPools:
    pools = LearnedPools(directory, keeps_examples=keeps_examples)
    for name, texts in TEXTS.items():
        pools.keep(name, texts)
    return pools


@pytest.mark.parametrize("keeps_examples", [False, True])
def test_a_restart_knows_what_was_learned(tmp_path: Path, keeps_examples: bool) -> None:
    kept_in(tmp_path, keeps_examples=keeps_examples)
    again = LearnedPools(tmp_path, keeps_examples=False).read(["law", "math", "other"])
    fresh = PoolClassifier.fit({name: counts_of(texts) for name, texts in TEXTS.items()})
    assert PoolClassifier.fit({name: counts(again)[name] for name in TEXTS}).margins(
        "the court"
    ) == fresh.margins("the court")


def test_texts_are_kept_only_if_the_operator_wants_it(tmp_path: Path) -> None:
    kept_in(tmp_path, keeps_examples=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "law.learned.npz",
        "math.learned.npz",
    ]
    with np.load(tmp_path / "law.learned.npz") as parts:
        assert all(SECRET.encode() not in parts[part].tobytes() for part in parts.files)
    kept_in(tmp_path, keeps_examples=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"law.examples.jsonl", "math.examples.jsonl"}
    examples = read_examples([tmp_path / "law.examples.jsonl"])
    assert [example.text for example in examples] == TEXTS["law"]


@pytest.mark.parametrize("keeps_examples", [False, True])
def test_only_the_owner_may_read_them_and_they_go_with_the_pool(
    tmp_path: Path, keeps_examples: bool
) -> None:
    pools = kept_in(tmp_path, keeps_examples=keeps_examples)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.suffix != ".json", "no pool file"
    for name in (*TEXTS, "other"):
        pools.forget(name)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pools = kept_in(tmp_path, keeps_examples=False)
    (tmp_path / "law.learned.npz").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "code.learned.npz").write_text("text")
    (tmp_path / "hot.examples.jsonl").write_text("{")
    with (tmp_path / "old.learned.npz").open("wb") as file:
        np.savez(file, kind=np.array("emo-serve counts 0"))
    with (tmp_path / "pickle.learned.npz").open("wb") as file:
        np.savez(file, kind=np.array([{}], dtype=object))
    names = ["code", "hot", "law", "math", "old", "pickle"]
    assert list(pools.read(names)) == ["math"]
    for name in set(names) - {"math"}:
        assert f"auto does not know pool {name} again" in caplog.text


def test_what_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pools = LearnedPools(tmp_path / "gone", keeps_examples=True)
    pools.keep("math", TEXTS["math"])
    pools.forget("math")
    assert "math.examples.jsonl is not kept for a restart" in caplog.text


def test_without_a_directory_or_a_classifier_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = kept_in(tmp_path, keeps_examples=False)
    nowhere = LearnedPools(None, keeps_examples=True)
    nowhere.keep("math", TEXTS["math"])
    nowhere.forget("math")
    assert nowhere.read(["math"]) == {}
    monkeypatch.setattr(learned, "is_installed", lambda: False)
    assert pools.read(["math"]) == {}
    pools.keep("code", ["x"])
    assert not (tmp_path / "code.learned.npz").exists()
