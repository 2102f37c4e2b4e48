"""Checkpoints: lazy reads, shards, and errors that name file, tensor and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_serve.emo.checkpoint import (
    Checkpoint,
    expert_tensor_name,
    load_model,
    parse_expert_name,
)
from emo_serve.errors import CheckpointError
from tests.golden.checkpoints import write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint("dense-first", tmp_path)


def test_names_round_trip() -> None:
    assert parse_expert_name(expert_tensor_name(3, 17, "down")) == (3, 17, "down")
    assert parse_expert_name("model.layers.3.mlp.gate.weight") is None
    assert parse_expert_name("model.layers.0.mlp.gate_proj.weight") is None  # a dense layer's


def test_an_expert_and_its_shards(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    whole = checkpoint.expert(1, 5)
    assert whole.gate_FD.shape == (64, 128) and whole.down_DF.shape == (128, 64)
    assert whole.num_bytes == checkpoint.expert_bytes == 3 * 64 * 128 * 2
    halves = [checkpoint.expert(1, 5, shard, 2) for shard in range(2)]
    assert torch.equal(torch.cat([half.gate_FD for half in halves]), whole.gate_FD)
    assert torch.equal(torch.cat([half.up_FD for half in halves]), whole.up_FD)
    assert torch.equal(torch.cat([half.down_DF for half in halves], 1), whole.down_DF)
    with pytest.raises(CheckpointError, match="64 does not divide by 3"):
        checkpoint.expert(1, 5, 0, 3)


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
