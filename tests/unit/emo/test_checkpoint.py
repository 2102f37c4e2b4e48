"""Checkpoints: lazy reads, shards, and errors that name file, tensor and value."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.tensor_names import NAMES, expert_tensor_name
from emo_serve.errors import CheckpointError
from tests.support.golden.checkpoints import write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint("dense-first", tmp_path)


def test_names_round_trip() -> None:
    assert NAMES.parse(expert_tensor_name(3, 17, "down")) == (3, 17, "down")
    assert NAMES.parse("model.layers.3.mlp.gate.weight") is None
    assert NAMES.parse("model.layers.0.mlp.gate_proj.weight") is None  # a dense layer's


def test_an_expert(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    expert = checkpoint.expert(1, 5)
    tensors = load_file(directory / "model.safetensors")
    for matrix in ("gate", "up", "down"):
        want = tensors[expert_tensor_name(1, 5, matrix)]
        assert torch.equal(getattr(expert, "down_DF" if matrix == "down" else f"{matrix}_FD"), want)
    assert expert.num_bytes == checkpoint.expert_bytes == 3 * 64 * 128 * 2


def test_trunk_is_everything_but_experts(directory: Path) -> None:
    names = set(Checkpoint.open(directory).trunk_names())
    everything = set(load_file(directory / "model.safetensors"))
    assert len(everything - names) == 3 * (24 + 12)
    assert "model.layers.0.mlp.gate_proj.bias" in names


def test_sharded_files_with_an_index(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    expected = load_model(directory).state_dict()
    (directory / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    got = load_model(directory).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    (directory / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="b.safetensors, which is not in"):
        Checkpoint.open(directory)


def test_missing_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[expert_tensor_name(2, 3, "up")]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers\.2.*experts\.3\.up"):
        Checkpoint.open(directory)


def test_wrong_shape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = expert_tensor_name(2, 3, "up")
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up.*\(63, 128\).*\(64, 128\)"):
        checkpoint.expert(2, 3)
    assert checkpoint.expert(2, 4).up_FD.shape == (64, 128)


def test_wrong_dtype(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = expert_tensor_name(2, 3, "up")
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="is I8, expected BF16"):
        Checkpoint.open(directory).expert(2, 3)


def test_what_happens_to_a_file_in_use_is_an_error(directory: Path) -> None:
    path = directory / "model.safetensors"
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expert(1, 5)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match=f"{len(whole) - 2} bytes; it had {len(whole)}"):
        checkpoint.check_expert(1, 5)
    path.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is gone: No such file"):
        checkpoint.expert(1, 5)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="restart"):
        checkpoint.check_expert(1, 5)
    Checkpoint.open(directory).check_expert(1, 5)


def test_checking_an_expert_finds_what_reading_would(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[expert_tensor_name(1, 1, "up")] = torch.zeros(64, 128, dtype=torch.int8)
    tensors[expert_tensor_name(1, 2, "down")] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expert(1, 0)
    with pytest.raises(CheckpointError, match=r"experts\.1\.up.* is I8, expected BF16"):
        checkpoint.check_expert(1, 1)
    with pytest.raises(CheckpointError, match=r"experts\.2\.down.*\(64, 128\).*\(128, 64\)"):
        checkpoint.check_expert(1, 2)
    with pytest.raises(CheckpointError, match=r"experts\.99\.gate_proj.weight is missing"):
        checkpoint.check_expert(1, 99)


def test_an_index_that_names_the_wrong_file(directory: Path) -> None:
    names = list(load_file(directory / "model.safetensors"))
    save_file({"other": torch.zeros(1)}, directory / "b.safetensors")
    lost = expert_tensor_name(1, 5, "up")
    files = {name: "b.safetensors" if name == lost else "model.safetensors" for name in names}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expert(1, 4)
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not hold tensor.*5\.up"):
        checkpoint.check_expert(1, 5)


def test_truncated_file(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint.open(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint.open(directory)


def test_fingerprint_follows_gates_and_rules_only(directory: Path) -> None:
    original = Checkpoint.open(directory).fingerprint()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, directory / "model.safetensors")
    assert Checkpoint.open(directory).fingerprint() == original
    tensors["model.layers.1.mlp.gate.weight"][0, 0] += 1
    save_file(tensors, directory / "model.safetensors")
    assert Checkpoint.open(directory).fingerprint() != original


# -- tensors of other software --

LEFT_OVER = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "model.layers.2.attn.masked_bias",
    "model.layers.2.attn.bias",
    "model.layers.2.self_attn.bias",
    "model.layers.2.attention.masked_bias",
    "model.embed_tokens.position_ids",
    "position_ids",
    "model.norm.num_batches_tracked",
    "model.layers.1.self_attn.q_proj._extra_state",
)
UNKNOWN = (
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.mlp.shared_expert.up_proj.weight",
    "model.layers.1.mlp.experts.24.gate_proj.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.3.self_attn.q_proj.weight",
    "lm_head.bias",
    "inv_freq_of_mine",
    "rotary_emb.inv_freq.weight",
    "transformer.wte.weight",
)


def add_tensors(directory: Path, *names: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    extra = {name: torch.zeros(2, dtype=torch.bool) for name in names}
    save_file(tensors | extra, directory / "model.safetensors")


def test_buffers_of_other_software_are_skipped_and_counted(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = set(Checkpoint.open(directory).trunk_names())
    add_tensors(directory, *LEFT_OVER)
    monkeypatch.setattr(logging.getLogger("emo_serve"), "propagate", True)
    with caplog.at_level(logging.INFO, "emo_serve"):
        checkpoint = Checkpoint.open(directory)
    assert set(checkpoint.trunk_names()) == expected
    (line,) = [text for text in caplog.messages if "skipped" in text]
    assert f"skipped {len(LEFT_OVER)} tensors" in line and min(LEFT_OVER) in line
    load_model(directory)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_without_a_place_is_named(directory: Path, name: str) -> None:
    add_tensors(directory, name, LEFT_OVER[0])
    with pytest.raises(CheckpointError, match="1 tensors have no place") as caught:
        Checkpoint.open(directory)
    assert f"'{name}'" in str(caught.value) and "inv_freq'" not in str(caught.value)


def test_of_many_tensors_without_a_place_a_few_are_named(directory: Path) -> None:
    add_tensors(directory, *(f"x{number}\n" for number in range(9)))
    with pytest.raises(CheckpointError, match=r"9 tensors have no place") as caught:
        Checkpoint.open(directory)
    text = str(caught.value)
    assert text.count("'x") == 4 and ", ...;" in text and "\n" not in text
