"""Tensor files: the same tensors as safetensors reads, and an error for every way to be broken."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.errors import CheckpointError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 5, generator=generator).bfloat16(),
        "b": torch.randn(3, generator=generator),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    return tmp_path / "some.safetensors"


shapes = st.lists(st.integers(0, 6), min_size=0, max_size=3)
contents = st.dictionaries(
    st.text("abc.\u00e9", min_size=1, max_size=8),
    st.tuples(st.sampled_from(DTYPES), shapes),
    max_size=5,
)


@given(contents=contents, data=st.data())
def test_reads_what_safetensors_reads(
    contents: dict[str, Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("drawn") / "x.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in contents.items()}
    save_file(tensors, path)
    file = TensorFile(path)
    assert file.names == tensors.keys()
    for name, tensor in sorted(load_file(path).items()):
        got = file.read(name)
        assert got.dtype == tensor.dtype == file.dtype(name) and torch.equal(got, tensor)
        if tensor.dim():
            start = data.draw(st.integers(0, len(tensor)))
            rows = slice(start, data.draw(st.integers(start, len(tensor))))
            assert torch.equal(file.read_rows(name, rows), tensor[rows])


def test_rows_go_where_the_caller_says(path: Path) -> None:
    expected = load_file(path)["a"]
    out = torch.zeros(9, 5, dtype=torch.bfloat16)
    assert TensorFile(path).read_rows("a", slice(2, 6), out[1:5]).data_ptr() == out[1].data_ptr()
    assert torch.equal(out[1:5], expected[2:6]) and not out[0].any() and not out[5:].any()


@pytest.mark.parametrize("rows", [slice(0, 600), slice(100, 101), slice(37, 411), slice(5, 5)])
def test_the_kernel_is_told_which_bytes_will_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: slice
) -> None:
    save_file(
        {"a": torch.zeros(3), "b": torch.zeros(600, 250), "c": torch.zeros(9)}, tmp_path / "x"
    )
    file = TensorFile(tmp_path / "x")
    told: list[tuple[int, int]] = []

    def fadvise(fd: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED and 0 < size <= 128 << 10
        told.append((start, start + size))
        raise OSError("a file system that takes no advice")

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    file.read_ahead("b", rows)
    covered = [byte for start, stop in told for byte in range(start, stop)]
    begin = file.info("b").start
    assert covered == list(range(begin + rows.start * 1000, begin + rows.stop * 1000))
    monkeypatch.delattr(os, "posix_fadvise")
    file.read_ahead("b", rows)  # does nothing where the system has no such call


def test_threads_may_share_a_file(path: Path) -> None:
    file, expected = TensorFile(path), load_file(path)
    wrong: list[str] = []

    def read(name: str) -> None:
        wrong.extend(name for _ in range(300) if not torch.equal(file.read(name), expected[name]))

    threads = [threading.Thread(target=read, args=(name,)) for name in ("a", "b", "a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_truncation_is_refused_when_opening(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="some.safetensors is not a whole safetensors"):
            TensorFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=f"end at byte {len(whole)}, the file has"):
        TensorFile(path)


def test_every_truncation_of_an_open_file_is_an_error_or_harmless(path: Path) -> None:
    whole, expected = path.read_bytes(), load_file(path)
    last = max(expected, key=lambda name: TensorFile(path).info(name).start)
    for length in range(len(whole)):
        path.write_bytes(whole)
        file = TensorFile(path)
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=f"has {length} bytes; it had {len(whole)}"):
            file.check()
        with pytest.raises(CheckpointError, match="the file was truncated"):
            file.read(last)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(1, 1))  # a clock too coarse to tell the two writes apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "is gone: No such file"),
        (replace, "was replaced or written to"),
        (write_into, "was replaced or written to"),
    ],
)
def test_a_change_to_an_open_file_is_noticed(
    path: Path, change: Callable[[Path], None], message: str
) -> None:
    file = TensorFile(path)
    file.check()
    change(path)
    with pytest.raises(CheckpointError, match=message):
        file.check()


def test_files_are_closed_when_nobody_holds_them(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [TensorFile(path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del files
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="x cannot be opened: No such file"):
        TensorFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        TensorFile(tmp_path)


def test_names_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"ids": torch.zeros(3, dtype=torch.int64)}, path)
    file = TensorFile(path)
    with pytest.raises(CheckpointError, match="x.safetensors does not hold tensor other"):
        file.read("other")
    with pytest.raises(CheckpointError, match="ids is I64, expected BF16, F16, F32"):
        file.read("ids")


def header_of(entry: object) -> bytes:
    return json.dumps({"t": entry}).encode()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{nonsense", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (header_of(7), "entry of t is 7"),
        (header_of({**GOOD, "shape": 2}), "entry of t"),
        (header_of({**GOOD, "shape": [-2]}), "entry of t"),
        (header_of({**GOOD, "shape": [True, 2]}), "entry of t"),
        (header_of({**GOOD, "dtype": 4}), "entry of t"),
        (header_of({**GOOD, "data_offsets": [0]}), "entry of t"),
        (header_of({**GOOD, "data_offsets": [8, 0]}), "entry of t"),
        (header_of({**GOOD, "shape": [3]}), r"F32 \[3\], has 8 bytes, expected 12"),
        (header_of({**GOOD, "data_offsets": [1, 9]}), "t starts at byte"),
        (header_of({**GOOD, "shape": [1], "data_offsets": [0, 4]}), "end at byte"),
    ],
)
def test_headers_that_make_no_sense(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=f"x.safetensors is not a whole.*{message}"):
        TensorFile(path)


def test_a_header_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match=f"header should have {2**63} bytes and the file 108"):
        TensorFile(path)
