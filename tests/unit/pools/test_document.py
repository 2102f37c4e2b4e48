"""The JSON of a pool: what a file may hold, how it is written, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emo_serve.emo.config import MoeLayer
from emo_serve.errors import PoolFileError
from emo_serve.pools.document import PoolDocument, parse_pool, read_pool, write_pool
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


def test_the_format_is_what_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "any-name.json"
    path.write_text(
        '{"format": "emo-pool/1", "name": "math", "layers": [null, {"experts": [3, 1]},'
        ' {"experts": [9, 0], "scores": [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]}],'
        ' "description": "d", "router_temperature": 2, "model": {"name": "m", "fingerprint": "f"},'
        ' "calibration": {"method": "router", "documents": 20, "tokens": 5120}}'
    )
    pool = read_pool(path)
    assert pool == ExpertPool(
        name="math",
        layers=(None, LayerExperts((1, 3)), LayerExperts((0, 9), tuple(map(float, range(16))))),
        router_temperature=2.0,
        description="d",
        model=PoolModel("m", "f"),
        calibration=PoolCalibration("router", 20, 5120),
    )
    pool.check_fits(MODEL, "f", str(path))


def test_optional_fields_may_be_absent_or_null(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    layer = {"experts": [1], "scores": None}
    fields = {"name": "p", "layers": [layer], "model": None, "calibration": None}
    path.write_text(json.dumps({"format": "emo-pool/1", **fields}))
    assert read_pool(path) == ExpertPool("p", (LayerExperts((1,)),))


REFUSED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"format": "emo-pool/2"}, "format is 'emo-pool/2'; expected 'emo-pool/1'"),
    ({"name": ""}, "name is ''"),
    ({"name": "Math"}, "name is 'Math'"),
    ({"name": "math+code"}, "'+' is reserved for unions"),
    ({"name": "base:math"}, "':' for base:pool"),
    ({"name": "math\n"}, "name is"),
    ({"name": "a" * 65}, "1 to 64 of"),
    ({"name": 3}, "name is 3"),
    ({"layers": []}, "layers is []"),
    ({"layers": {"0": {"experts": [1]}}}, "layers is"),
    ({"layers": [[1, 2]]}, "layer 0: the entry is [1, 2]; expected an object"),
    ({"layers": [None, {"expert": [1]}]}, "layer 1: a key of the entry is 'expert'"),
    ({"layers": [{}]}, "layer 0: 'experts' is missing"),
    ({"layers": [{"experts": "1"}]}, "layer 0: experts is '1'"),
    ({"layers": [{"experts": [0, True]}]}, "layer 0: experts[1] is True; expected an id"),
    ({"layers": [{"experts": [1.0]}]}, "experts[0] is 1.0"),
    ({"layers": [{"experts": [-1]}]}, "experts[0] is -1"),
    ({"layers": [{"experts": [4, 2, 4]}]}, "experts[2] is 4; expected each id once"),
    ({"layers": [{"experts": [2], "scores": [0.1, 0.2]}]}, "the number of scores is 2; expected"),
    ({"layers": [{"experts": [0], "scores": [True]}]}, "scores[0] is True"),
    ({"layers": [{"experts": [0], "scores": ["1"]}]}, "scores[0] is '1'"),
    ({"layers": [{"experts": [0], "scores": [float("nan")]}]}, "layer 0: scores[0] is nan"),
    ({"layers": [{"experts": [0], "scores": [float("-inf")]}]}, "scores[0] is -inf"),
    ({"layers": [{"experts": [0], "scores": [10**400]}]}, "layer 0: scores[0] is 1000"),
    ({"router_temperature": 0}, "router_temperature is 0; expected a finite number above 0"),
    ({"router_temperature": -1.5}, "router_temperature is -1.5"),
    ({"router_temperature": float("inf")}, "router_temperature is inf"),
    ({"router_temperature": True}, "router_temperature is True"),
    ({"router_temperature": None}, "router_temperature is None"),
    ({"description": 5}, "description is 5"),
    ({"model": "emo"}, "model is 'emo'; expected an object"),
    ({"model": {"hash": "x"}}, "a key of model is 'hash'"),
    ({"model": {"name": 1}}, "model.name is 1"),
    ({"calibration": {}}, "'method' is missing from calibration"),
    ({"calibration": {"method": 1}}, "calibration.method is 1"),
    ({"calibration": {"method": "router", "tokens": -1}}, "calibration.tokens is -1"),
    ({"calibration": {"method": "router", "tokens": True}}, "calibration.tokens is True"),
    ({"experts": 8}, "a key of the file is 'experts'; expected one of format, name, layers"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_refused_with_file_value_and_expectation(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.json"
    good = {"format": "emo-pool/1", "name": "math", "layers": [{"experts": [1, 2]}]}
    path.write_text(json.dumps(good))
    read_pool(path)
    path.write_text(json.dumps(good | fields))
    with pytest.raises(PoolFileError) as caught:
        read_pool(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("missing", ["format", "name", "layers"])
def test_a_missing_field_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "bad.json"
    fields = {"format": "emo-pool/1", "name": "math", "layers": [{"experts": [1]}]}
    del fields[missing]
    path.write_text(json.dumps(fields))
    with pytest.raises(PoolFileError, match=f"'{missing}' is missing"):
        read_pool(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"name": ' + b"9" * 5000 + b"}", b'"a pool"'],
    ids=["empty", "cut", "not-utf8", "deep", "huge-int", "not-an-object"],
)
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(PoolFileError, match=r"bad\.json: "):
        read_pool(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"format": "emo-pool/1", "name": "a", "name": "b", "layers": [null]}')
    with pytest.raises(PoolFileError, match="'name' is given twice"):
        read_pool(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolFileError, match="cannot be read"):
        read_pool(tmp_path / "absent.json")


def test_long_values_are_shortened_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    fields = {"format": "emo-pool/1", "name": "x" * 10**6, "layers": [None]}
    path.write_text(json.dumps(fields))
    with pytest.raises(PoolFileError) as caught:
        read_pool(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_pool(a_pool(description="old"), path)
    write_pool(a_pool(description="new"), path)
    assert read_pool(path).description == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json"
    write_pool(a_pool(description="old"), path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(PoolFileError, match="cannot be written: No space left"):
        write_pool(a_pool(description="new"), path)
    assert read_pool(path).description == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_union_has_no_name_a_file_may_carry(tmp_path: Path) -> None:
    union = a_pool("a").union(a_pool("b"))
    with pytest.raises(PoolFileError, match="reserved for unions"):
        write_pool(union, tmp_path / "u.json")
    write_pool(replace(union, name="ab"), tmp_path / "u.json")


def test_a_place_is_that_of_the_file_not_of_the_sorted_pool() -> None:
    document = {"format": "emo-pool/1", "name": "p", "layers": [{"experts": [7, 7, 2]}]}
    with pytest.raises(PoolFileError, match=r"layer 0: experts\[1\] is 7; expected each id once"):
        parse_pool("p", document)


def test_the_schema_says_what_ids_scores_and_temperatures_are() -> None:
    schema = PoolDocument.model_json_schema()
    layer = schema["$defs"]["DocumentLayer"]["properties"]
    assert layer["experts"]["items"] == {"minimum": 0, "type": "integer"}
    assert layer["scores"]["anyOf"][0]["items"] == {"type": "number"}
    assert schema["properties"]["router_temperature"]["exclusiveMinimum"] == 0
    assert schema["properties"]["name"]["pattern"] == "^[a-z0-9._-]{1,64}$"
    assert schema["properties"]["layers"]["minItems"] == 1
