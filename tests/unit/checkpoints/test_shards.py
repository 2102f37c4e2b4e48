"""The safetensors writer, read back by the library that defines the format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from emo_serve.checkpoints.shards import NewTensor, write_shards
from emo_serve.checkpoints.tensor_file import TensorFile

TENSORS = {
    "a.bias": torch.randn(3).bfloat16(),  # 6 bytes: what follows would not be aligned
    "a.weight": torch.randn(5, 4),
    "b.weight": torch.randn(7, 3).half(),
    "c.weight": torch.randn(2, 3, 5).bfloat16(),
    "d.none": torch.zeros(0, 4),
}


def new_tensors(rows: int = 2) -> list[NewTensor]:
    def new(name: str, tensor: torch.Tensor) -> NewTensor:
        return NewTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.split(rows))

    return [new(name, tensor) for name, tensor in TENSORS.items()]


def assert_same(got: dict[str, torch.Tensor]) -> None:
    assert got.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_one_file_reads_back_in_the_library_and_in_our_reader(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, new_tensors(), None)
    assert path == tmp_path / "model.safetensors"
    assert_same(load_file(path))
    ours = TensorFile(path)  # refuses gaps and overlaps
    assert_same({name: ours.read(name) for name in ours.names})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.json"))


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, new_tensors(), None)
    file = TensorFile(path)
    for name, tensor in TENSORS.items():
        assert file.info(name).start % tensor.element_size() == 0


@pytest.mark.parametrize(("shard_bytes", "files"), [(1, 5), (100, 3), (10**6, 1)])
def test_shards_hold_what_the_index_says(tmp_path: Path, shard_bytes: int, files: int) -> None:
    paths = write_shards(tmp_path, new_tensors(), shard_bytes)
    names = [f"model-{n:05d}-of-{files:05d}.safetensors" for n in range(1, files + 1)]
    assert [path.name for path in paths] == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"].values()) == set(names)
    assert_same({name: load_file(tmp_path / f)[name] for name, f in index["weight_map"].items()})
    for path in paths:
        held = load_file(path)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes


def test_a_tensor_is_asked_for_when_its_turn_comes(tmp_path: Path) -> None:
    sizes: list[int] = []

    def pieces() -> Iterator[torch.Tensor]:
        for _ in range(3):
            sizes.append((tmp_path / "model.safetensors").stat().st_size)
            yield torch.zeros(10**5)

    tensors = [NewTensor(name, torch.float32, (3 * 10**5,), pieces) for name in "ab"]
    write_shards(tmp_path, tensors, None)
    assert sizes == sorted(set(sizes)) and len(sizes) == 6  # the file grew before each piece
