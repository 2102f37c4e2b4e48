"""Checkpoints: lazy reads, shards, and errors that name file, tensor and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.tensor_names import expert_tensor_name, parse_expert_name
from emo_serve.errors import CheckpointError
from tests.support.golden.checkpoints import write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint("dense-first", tmp_path)


def test_names_round_trip() -> None:
    assert parse_expert_name(expert_tensor_name(3, 17, "down")) == (3, 17, "down")
    assert parse_expert_name("model.layers.3.mlp.gate.weight") is None
    assert parse_expert_name("model.layers.0.mlp.gate_proj.weight") is None  # a dense layer's


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
