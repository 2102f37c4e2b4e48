"""Valid JSON of a wrong shape beside a checkpoint: refused in one line with file, field, value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emo_serve.checkpoints.companions import check_companions
from emo_serve.cli import main as cli
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import CheckpointError, ConfigError
from tests.support.golden.checkpoints import config_of, write_checkpoint

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("original"))


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for each test; the weights are one file."""
    for file in original.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def replace_json(path: Path, value: object) -> None:
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(value))


def refusal_of(directory: Path, file: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Checkpoint.open(directory)
    text = str(caught.value)
    assert text.startswith(str(directory / file)), text
    assert "\n" not in text and text.isascii() and len(text) < 1000
    return text


# -- the index --


def index_of(directory: Path, **changed: object) -> dict[str, Any]:
    names = load_file(directory / "model.safetensors")
    return {"weight_map": {**dict.fromkeys(names, "model.safetensors"), **changed}}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "the file is []; expected a JSON object"),
        ("x", "the file is 'x'; expected a JSON object"),
        (7, "the file is 7; expected a JSON object"),
        (None, "the file is None; expected a JSON object"),
        ({}, "weight_map is None; expected an object"),
        ({"weight_map": None}, "weight_map is None; expected an object"),
        ({"weight_map": ["model.safetensors"]}, "weight_map is ['model.safetensors']; expected"),
        ({"weight_map": "model.safetensors"}, "weight_map is 'model.safetensors'; expected"),
    ],
)
def test_an_index_of_a_wrong_shape(directory: Path, index: object, words: str) -> None:
    replace_json(directory / INDEX, index)
    assert words in refusal_of(directory, INDEX)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "is None; expected the name of a file in"),
        (7, "is 7; expected"),
        (True, "is True; expected"),
        (["model.safetensors"], "is ['model.safetensors']; expected"),
        ({}, "is {}; expected"),
        ("", "is ''; expected"),
        (".", "is '.'; expected"),
        ("/etc/passwd", "is '/etc/passwd'; expected"),
        ("../other/model.safetensors", "is '../other/model.safetensors'; expected"),
        ("a/../../model.safetensors", "is 'a/../../model.safetensors'; expected"),
        ("a\x00b", r"is 'a\x00b'; expected"),
        ("\ud800", "which is not in"),
        ("x" * 5000, "which is not in"),
        ("folder", "names folder, which is not in"),
        ("absent.safetensors", "names absent.safetensors, which is not in"),
    ],
)
def test_an_index_that_names_no_file(directory: Path, file: object, words: str) -> None:
    (directory / "folder").mkdir()
    replace_json(directory / INDEX, index_of(directory, **{EMBEDDING: file}))
    text = refusal_of(directory, INDEX)
    assert words in text and f"weight_map['{EMBEDDING}']" in text


def test_a_shard_that_lacks_a_tensor_of_the_trunk(directory: Path) -> None:
    save_file({"other": torch.zeros(1)}, directory / "b.safetensors")
    replace_json(directory / INDEX, index_of(directory, **{EMBEDDING: "b.safetensors"}))
    assert f"does not hold tensor {EMBEDDING}" in refusal_of(directory, "b.safetensors")


def test_a_shard_that_is_another_file(directory: Path) -> None:
    replace_json(directory / INDEX, index_of(directory, **{EMBEDDING: "config.json"}))
    assert "not a whole safetensors file" in refusal_of(directory, "config.json")


def test_a_file_below_the_directory_may_be_named(directory: Path) -> None:
    (directory / "shards").mkdir()
    (directory / "model.safetensors").rename(directory / "shards" / "a.safetensors")
    names = load_file(directory / "shards" / "a.safetensors")
    weight_map = dict.fromkeys(names, "shards/a.safetensors")
    replace_json(directory / INDEX, {"metadata": [], "weight_map": weight_map})
    assert Checkpoint.open(directory).expert(1, 5).num_bytes


# -- headers --


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'"x"',
        b"7",
        b"null",
        b"[" * 100_000,
        b'{"a": null}',
        b'{"a": []}',
        b'{"a": {"dtype": "BF16", "shape": null, "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": "ab", "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": ["BF16"], "shape": [0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "BF16", "shape": [true], "data_offsets": [0, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": "02"}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1, 2]}}',
        b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 0]}}',
    ],
)
def test_a_header_of_a_wrong_shape(directory: Path, header: bytes) -> None:
    path = directory / "model.safetensors"
    path.unlink()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is not a whole safetensors file" in refusal_of(directory, "model.safetensors")


# -- a config and weights that contradict each other --


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 321}, "embed_tokens.weight has shape (320, 128), the config says (321,"),
        ({"hidden_size": 256}, "embed_tokens.weight has shape (320, 128)"),
        ({"num_key_value_heads": 2}, "k_proj.weight has shape (128, 128), the config says (64,"),
        ({"dense_intermediate_size": 2**31 - 1}, "gate_proj.weight has shape (160, 128)"),
        ({"num_experts_per_layer": [0, 23, 12]}, "mlp.gate.weight has shape (24, 128)"),
        ({"intermediate_size": 2**31 - 1}, "experts.0.gate_proj.weight has shape (64, 128)"),
        ({"num_experts_per_layer": [0, 65536, 12]}, "more than 100000 tensors are missing"),
        ({"attention_bias": True}, "12 tensors are missing"),
    ],
)
def test_a_config_that_is_not_the_weights(
    directory: Path, fields: dict[str, object], words: str
) -> None:
    replace_json(directory / "config.json", {**config_of("dense-first"), **fields})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert words in str(caught.value)


def test_rope_without_usable_frequencies(directory: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}  # divides by the logarithm of 1
    replace_json(directory / "config.json", {**config_of("dense-first"), "rope_scaling": rope})
    text = refusal_of(directory, "config.json")
    assert "rope_parameters is {" in text and "expected numbers that give finite" in text


# -- companions --

WRONG: list[tuple[str, object, str]] = [
    ("generation_config.json", [], "the file is []; expected a JSON object"),
    ("generation_config.json", "x", "the file is 'x'"),
    ("generation_config.json", None, "the file is None"),
    ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot'; expected a finite"),
    ("generation_config.json", {"temperature": -1}, "temperature is -1"),
    ("generation_config.json", {"temperature": True}, "temperature is True"),
    ("generation_config.json", {"top_p": 2}, "top_p is 2; expected a number from 0 to 1"),
    ("generation_config.json", {"top_k": 1.5}, "top_k is 1.5; expected an integer"),
    ("generation_config.json", {"top_k": 10**20}, "top_k is 100000000000000000000"),
    ("generation_config.json", {"max_new_tokens": []}, "max_new_tokens is []"),
    (
        "generation_config.json",
        {"eos_token_id": "</s>"},
        "eos_token_id is '</s>'; expected a",
    ),
    ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id is [[1]]"),
    ("tokenizer_config.json", [], "the file is []"),
    ("tokenizer_config.json", 7, "the file is 7"),
    ("tokenizer_config.json", {"chat_template": 7}, "chat_template is 7; expected a string or"),
    ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template is ['x']"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7; expected a string or an object"),
    ("tokenizer_config.json", {"tokenizer_class": []}, "tokenizer_class is []"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": "x"}}, "added_tokens_decoder is"),
    ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens is"),
    ("tokenizer_config.json", {"model_max_length": "4096"}, "model_max_length is '4096'"),
    ("tokenizer.json", [], "the file is []"),
    ("tokenizer.json", {}, "the tokenizers library cannot read it"),
    ("tokenizer.json", {"model": {}}, "the tokenizers library cannot read it"),
    ("tokenizer.json", {"added_tokens": ["x"]}, "added_tokens is ['x']; expected a list of"),
    ("tokenizer.json", {"model": None}, "model is None; expected an object"),
    ("special_tokens_map.json", "x", "the file is 'x'"),
    ("special_tokens_map.json", {"eos_token": 7}, "eos_token is 7"),
    ("added_tokens.json", {"<a>": "1"}, "<a> is '1'; expected an integer"),
]


@pytest.mark.parametrize(("file", "value", "words"), WRONG)
def test_a_companion_of_a_wrong_shape(
    directory: Path, file: str, value: object, words: str
) -> None:
    replace_json(directory / file, value)
    assert words in refusal_of(directory, file)


def test_what_companions_usually_hold_is_taken(directory: Path) -> None:
    replace_json(
        directory / "generation_config.json",
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2], "x": [{}]},
    )
    replace_json(
        directory / "tokenizer_config.json",
        {
            "model_max_length": 1000000000000000019884624838656,
            "eos_token": {"content": "<e>", "lstrip": False},
            "added_tokens_decoder": {"5": {"content": "<e>"}},
            "chat_template": [{"name": "default", "template": "x"}],
            "extra_special_tokens": {},
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    replace_json(directory / "special_tokens_map.json", {"additional_special_tokens": ["<a>"]})
    check_companions(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
KNOWN = ["temperature", "top_k", "early_stopping", "num_beams", "cache_implementation", "suffix"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KNOWN), JSON, min_size=1))
def test_any_generation_config_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object]
) -> None:
    directory = tmp_path_factory.mktemp("model")
    (directory / "generation_config.json").write_text(json.dumps(fields))
    try:
        check_companions(directory)
    except ConfigError as error:
        assert str(error).startswith(str(directory / "generation_config.json"))
        assert "\n" not in str(error)


# -- the same line from every command --


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        (INDEX, [], "the file is []; expected a JSON object"),
        ("config.json", {**config_of("dense-first"), "torch_dtype": "x"}, "torch_dtype is 'x'"),
        ("generation_config.json", [], "the file is []; expected a JSON object"),
        ("tokenizer_config.json", "x", "the file is 'x'; expected a JSON object"),
    ],
)
def test_every_command_says_the_same(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    value: object,
    words: str,
) -> None:
    replace_json(directory / file, value)
    pools, examples = directory / "pools", directory / "a.txt"
    pools.mkdir()
    examples.write_text("some text")
    model = str(directory)
    for command in (
        ["pools", "list", str(pools), "--model", model],
        ["pools", "build", "a", "--model", model, "--examples", str(examples), "--experts", "4"],
        ["pools", "export", "a", "--pools", str(pools), "--model", model, "--out", f"{model}/out"],
    ):
        assert cli.main(command) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"emo-serve: {directory / file}: {words}"), output.err
        assert output.err.count("\n") == 1
