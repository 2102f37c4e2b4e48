"""The JSON of a pool: what a file may hold, how it is written, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.cli.rendering.tables import describe_pool, pool_table
from emo_serve.errors import PoolFileError, RequestError
from emo_serve.facts import MoeLayer
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import PoolDocument, parse_build, parse_pool, read_pool, write_pool
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
    *(({"name": name}, f"name is {name!r}; expected 1") for name in (".", "..", ".a", "...json")),
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
    ({"router_temperature": 1e39}, "router_temperature is 1e+39; expected a finite number above 0"),
    ({"router_temperature": 1e31}, "router_temperature is 1e+31; expected a finite number above 0"),
    ({"router_temperature": 1e-40}, "router_temperature is 1e-40; expected a finite number"),
    ({"router_temperature": 1e-31}, "from 1e-30 to 1e+30"),
    ({"router_temperature": 10**40}, "router_temperature is 1000000000000000"),
    ({"router_temperature": 5e-324}, "router_temperature is 5e-324"),
    ({"router_temperature": "1"}, "router_temperature is '1'"),
    ({"router_temperature": float("nan")}, "router_temperature is nan"),
    ({"layers": [{"experts": [2**16]}]}, "experts[0] is 65536; expected an id of at most 65535"),
    ({"layers": [{"experts": [10**30]}]}, "layer 0: experts[0] is 10000000"),
    ({"layers": [{"experts": [0], "scores": [0] * 65537}]}, "the number of scores is 65537"),
    ({"layers": [None] * 4097}, "the number of layers is 4097; expected at most 4096"),
    ({"model": {"implied": [[10**30]]}}, "layer 0: model.implied is [1000000"),
    ({"calibration": {"method": "router", "tokens": 2**63}}, "tokens is 9223372036854775808"),
    ({"calibration": {"method": "router", "seed": 10**30}}, "calibration.seed is 1000"),
    ({"calibration": {"method": "x" * 1001}}, "expected at most 1000 characters, not 1001"),
    ({"calibration": {"method": "a\nb"}}, r"calibration.method is 'a\nb'; expected text without"),
    ({"description": "a\x00b"}, r"description is 'a\x00b'; expected text without control"),
    ({"description": "\x1b[31m"}, r"description is '\x1b[31m'; expected text without control"),
    ({"description": "\x9b1m"}, r"description is '\x9b1m'"),
    ({"description": "\ud800"}, r"description is '\ud800'; expected text without"),
    ({"description": "x" * 10001}, "expected at most 10000 characters, not 10001"),
    ({"model": {"name": "\udcff"}}, r"model.name is '\udcff'; expected text without"),
    ({"model": {"name": "x" * 1001}}, "expected at most 1000 characters"),
    ({"model": {"fingerprint": "a\x7f"}}, r"model.fingerprint is 'a\x7f'; expected"),
    ({"model": {"fingerprint": "f" * 1001}}, "expected at most 1000 characters"),
    ({"router_temperature": True}, "router_temperature is True"),
    (
        {"default_experts": 0},
        "default_experts is 0; expected a number of experts per layer, from 1",
    ),
    ({"default_experts": 2**16 + 1}, "default_experts is 65537; expected a number of experts"),
    ({"default_experts": "8"}, "default_experts is '8'; expected a number of experts"),
    ({"default_experts": True}, "default_experts is True"),
    ({"default_experts": 8, "layers": [{"experts": [0]}]}, "expected no such key: a layer has no"),
    ({"name": "math@8"}, "'@' for sizes"),
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


def test_a_link_stays_one_and_its_target_is_replaced_whole(tmp_path: Path) -> None:
    target, path = tmp_path / "elsewhere" / "real.txt", tmp_path / "p.json"
    target.parent.mkdir()
    write_pool(a_pool(description="old"), target)
    old = target.stat().st_ino
    path.symlink_to("middle.json")
    (tmp_path / "middle.json").symlink_to(target)
    write_pool(a_pool(description="new"), path)
    assert path.is_symlink() and (tmp_path / "middle.json").is_symlink()
    assert read_pool(target).description == read_pool(path).description == "new"
    assert target.stat().st_ino != old, "readers of the old file keep it"
    assert [file.name for file in target.parent.iterdir()] == ["real.txt"]


def test_a_link_to_nothing_is_filled_and_a_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").symlink_to("new.json")
    write_pool(a_pool(), tmp_path / "p.json")
    assert (tmp_path / "p.json").is_symlink() and read_pool(tmp_path / "new.json") == a_pool()
    for link, target in (("a.json", "b.json"), ("b.json", "a.json"), ("c.json", "no/d.json")):
        (tmp_path / link).symlink_to(target)
    for link in ("a.json", "c.json"):
        with pytest.raises(PoolFileError, match=rf"{link}: cannot be written: "):
            write_pool(a_pool(), tmp_path / link)


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_pool(a_pool(), path)
    path.chmod(0o640)
    write_pool(a_pool(description="new"), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_pool(a_pool(), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_pool(path) == a_pool()
    path.write_bytes(b"\xef\xbb\xbf" * 2 + b"{}")
    with pytest.raises(PoolFileError, match="is not UTF-8 JSON"):
        read_pool(path)


def test_a_union_has_no_name_a_file_may_carry(tmp_path: Path) -> None:
    union = a_pool("a").union(a_pool("b"))
    with pytest.raises(PoolFileError, match="reserved for unions"):
        write_pool(union, tmp_path / "u.json")
    write_pool(replace(union, name="ab"), tmp_path / "u.json")


LETTERS = st.characters() | st.sampled_from(["\ud800", "\x00", "\n", "\x1b", "\u202e"])
TEXTS = st.text(LETTERS, max_size=20)
INTEGERS = st.integers(0, 2**70)
DOCUMENTS = st.fixed_dictionaries(
    {
        "format": st.just("emo-pool/1"),
        "name": st.from_regex(r"[a-z0-9._-]{1,8}", fullmatch=True),
        "layers": st.lists(
            st.none()
            | st.fixed_dictionaries(
                {"experts": st.lists(st.integers(0, 9) | INTEGERS, max_size=3, unique=True)}
            ),
            min_size=1,
            max_size=2,
        ),
    },
    optional={
        "description": TEXTS,
        "router_temperature": st.floats() | INTEGERS | st.floats(0, 1e-29) | st.floats(1e29, 1e40),
        "model": st.fixed_dictionaries({}, optional={"name": TEXTS, "fingerprint": TEXTS}),
        "calibration": st.fixed_dictionaries(
            {"method": TEXTS}, optional={"tokens": INTEGERS, "seed": INTEGERS}
        ),
    },
)


@settings(max_examples=400, deadline=None)
@given(DOCUMENTS)
def test_what_is_taken_can_be_held_stored_and_shown_and_the_rest_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    try:
        pool = parse_pool("p.json", document)
    except PoolFileError as error:
        assert str(error).startswith("p.json: ")
        assert str(error).isprintable() and len(str(error)) < 500
        return
    temperature = np.float32(pool.router_temperature)
    smallest = np.finfo(np.float32).tiny
    logits = np.array([1e8, -1e8, 0.01], np.float32)
    assert smallest <= temperature < np.inf and smallest <= np.float32(1) / temperature < np.inf
    assert np.isfinite(logits / temperature).all()
    path = tmp_path_factory.mktemp("pool") / "p.json"
    write_pool(pool, path)
    assert read_pool(path) == pool
    shown = describe_pool(pool) + pool_table([pool])
    assert "\x1b" not in shown and "\x00" not in shown
    json.dumps(pool.description, ensure_ascii=False).encode()
    shown.encode()


def test_a_description_may_have_lines_and_any_script() -> None:
    text = "Zahlen\tund \u6570\u5b66\nsecond line \U0001f468\u200d\U0001f469"
    layers = [{"experts": [65535]}]
    document = {"format": "emo-pool/1", "name": "p", "layers": layers, "description": text}
    assert parse_pool("p", document).description == text


def test_a_file_too_large_to_be_a_pool_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(2**36)  # a hole
    with pytest.raises(PoolFileError, match="p.json: is larger than 64 MiB"):
        read_pool(path)


@pytest.mark.parametrize("name", ["a\nb.json", "a\x1bb.json", "a\udcffb.json"])
def test_a_file_name_that_cannot_be_shown_is_escaped(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    (error,) = PoolCatalog.read(tmp_path).refused
    assert str(error).isprintable() and str(error).encode()
    assert name.encode("unicode_escape").decode() in str(error)


def test_a_pipe_is_no_pool_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.json")
    (error,) = PoolCatalog.read(tmp_path).refused
    assert str(error) == f"{tmp_path / 'p.json'}: is a pipe or a device; expected a file"


BUILD = {"name": "p", "examples": ["a text"], "experts": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router_temperature": 1e39}, "router_temperature is 1e+39; expected a finite number"),
        ({"router_temperature": 1e-40}, "router_temperature is 1e-40; expected a finite number"),
        ({"description": "a\x00"}, r"description is 'a\x00'; expected text without"),
        ({"description": "x" * 10001}, "at most 10000 characters"),
        ({"examples": ["a\ud800"]}, r"examples[0].text is 'a\ud800'; expected some text"),
        ({"examples": [{"text": "\udfff."}]}, "expected some text, without lone surrogates"),
        ({"examples": [{"messages": [{"role": "user", "content": "\ud800"}]}]}, "messages[0] is"),
        ({"examples": [{"messages": [{"role": "\ud800", "content": "a"}]}]}, "messages[0] is"),
        (
            {"examples": [{"messages": [{"role": "user", "content": "a", "x": ["\ud800"]}]}]},
            "messages[0] is",
        ),
    ],
)
def test_a_build_of_what_cannot_be_held_is_refused(fields: dict[str, Any], words: str) -> None:
    parse_build(BUILD)
    with pytest.raises(RequestError) as caught:
        parse_build(BUILD | fields)
    assert str(caught.value).startswith("body: ") and words in str(caught.value)
    assert str(caught.value).isascii()


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
    assert schema["properties"]["name"]["pattern"] == "^[a-z0-9_-][a-z0-9._-]{0,63}$"
    assert schema["properties"]["layers"]["minItems"] == 1
