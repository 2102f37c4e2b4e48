"""The expert store: what it packs, what it keeps in host memory, what it reads."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import emo_kernels
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import CheckpointError
from emo_serve.vllm_plugin.backends import (
    MoeBackend,
    ReferenceBackend,
    TritonFp8Backend,
)
from emo_serve.vllm_plugin.cpu_backend import CpuBackend, VllmCpuBackend
from emo_serve.vllm_plugin.expert_store import StoreCounts
from tests.support.expert_stores import are_equal, exhaust, expected, make_store, packed, spare
from tests.support.golden.checkpoints import write_checkpoint

EXPERT_BYTES = 3 * 128 * 64 * 2  # in the files


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("shared1"))


@pytest.mark.parametrize("piece_bytes", [1, 10_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "backend",
    [ReferenceBackend(), CpuBackend.of(torch.float32), VllmCpuBackend(), TritonFp8Backend()],
    ids=lambda b: type(b).__name__,
)
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2)])
def test_an_expert_is_packed_as_the_slab_wants_it(
    directory: Path,
    piece_bytes: int,
    dtype: torch.dtype,
    backend: MoeBackend,
    rank: int,
    num_ranks: int,
) -> None:
    store, shape = make_store(
        directory,
        dtype=dtype,
        backend=backend,
        rank=rank,
        num_ranks=num_ranks,
        piece_bytes=piece_bytes,
    )
    memory = spare(shape)
    got, steps = exhaust(store.fetch(1, 5, memory))
    assert got is memory
    tensors = load_file(directory / "model.safetensors")
    assert are_equal(got, packed(backend, shape, expected(tensors, 1, 5, rank, num_ranks)))
    if piece_bytes == 1:
        rows = 2 * 64 // num_ranks + 128  # down_proj is read whole: its columns are shared out
        assert steps == rows / backend.row_block
    read = EXPERT_BYTES if num_ranks == 1 else EXPERT_BYTES * 2 // 3  # half of gate and up
    assert store.counts == StoreCounts(bytes_read=read, disk_reads=1)


@pytest.mark.parametrize("piece_bytes", [1, 10_000, 1 << 20])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2)])
def test_fp8_is_what_quantising_whole_matrices_gives(
    directory: Path, piece_bytes: int, rank: int, num_ranks: int
) -> None:
    store, shape = make_store(
        directory,
        backend=TritonFp8Backend(),
        rank=rank,
        num_ranks=num_ranks,
        piece_bytes=piece_bytes,
    )
    got, _ = exhaust(store.fetch(1, 5, spare(shape)))
    tensors = load_file(directory / "model.safetensors")
    weights = expected(tensors, 1, 5, rank, num_ranks)
    for matrix, weight in zip((got.w13, got.w2), weights, strict=True):
        values, scales = emo_kernels.quantize(weight)
        assert torch.equal(matrix.values, values)
        assert matrix.scales is not None and torch.equal(matrix.scales, scales)


def test_host_memory_is_bounded_and_gives_up_the_oldest(directory: Path) -> None:
    store, shape = make_store(directory, host_experts=2.9)
    assert store.host.num_bytes == 2 * shape.num_bytes
    memory = spare(shape)

    def fetch(expert: int) -> bool:
        """Return whether the expert was in host memory."""
        before = store.counts
        got, _ = exhaust(store.fetch(0, expert, memory))
        assert got is not memory
        since = store.counts.since(before)
        assert since in (StoreCounts(host_hits=1), StoreCounts(EXPERT_BYTES, disk_reads=1))
        return since.host_hits == 1

    assert [fetch(expert) for expert in (1, 2, 1, 3, 1, 2)] == [
        *(False, False, True),
        *(False, True, False),  # 3 took the place of 2, the oldest; 2 that of 3
    ]
    assert len(store.host) == 2


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    host_experts=st.integers(0, 5),
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=30),
)
def test_any_order_of_fetches_gives_the_right_weights(
    directory: Path, host_experts: int, asked: list[tuple[int, int]]
) -> None:
    tensors = load_file(directory / "model.safetensors")
    store, shape = make_store(directory, host_experts=host_experts)
    memory, model = spare(shape), OrderedDict[tuple[int, int], None]()
    hits = 0
    for layer, expert in asked:
        got, _ = exhaust(store.fetch(layer, expert, memory))
        assert all(map(torch.equal, got.tensors(), expected(tensors, layer, expert)))
        hits += (layer, expert) in model
        model[layer, expert] = None
        model.move_to_end((layer, expert))
        while len(model) > host_experts:
            model.popitem(last=False)
        assert len(store.host) == len(model)
    assert store.counts.host_hits == hits
    assert store.counts.disk_reads == len(asked) - hits
    assert store.counts.bytes_read == (len(asked) - hits) * EXPERT_BYTES


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2)])
def test_what_is_read_ahead_is_what_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int
) -> None:
    store, shape = make_store(directory, host_experts=1, rank=rank, num_ranks=num_ranks)
    told: list[tuple[str, int, int]] = []
    read: list[tuple[str, int, int]] = []
    read_rows = TensorFile.read_rows

    def note_read(
        file: TensorFile, name: str, rows: slice, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        read.append((name, rows.start, rows.stop))
        return read_rows(file, name, rows, out)

    monkeypatch.setattr(TensorFile, "read_rows", note_read)
    monkeypatch.setattr(
        TensorFile, "read_ahead", lambda _, name, rows: told.append((name, rows.start, rows.stop))
    )
    store.read_ahead(1, 5)
    assert store.counts == StoreCounts(), "nothing is read yet"
    exhaust(store.fetch(1, 5, spare(shape)))
    assert {(n, row) for n, start, stop in told for row in range(start, stop)} == {
        (n, row) for n, start, stop in read for row in range(start, stop)
    }
    told.clear()
    store.read_ahead(1, 5)
    assert not told, "it is in host memory now"


def test_reading_ahead_leaves_errors_to_the_fetch(tmp_path: Path) -> None:
    store, shape = make_store(write_checkpoint("shared1", tmp_path))
    store.read_ahead(0, 99)
    with pytest.raises(CheckpointError, match=r"experts\.99"):
        exhaust(store.fetch(0, 99, spare(shape)))


@pytest.mark.parametrize(
    ("file_bytes", "ahead"), [(EXPERT_BYTES, 1365), (12 << 20, 5), (1 << 30, 2)]
)
def test_reading_ahead_is_bounded_by_bytes(
    directory: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, ahead: int
) -> None:
    monkeypatch.setattr(Checkpoint, "expert_bytes", file_bytes)
    assert make_store(directory)[0].experts_ahead == ahead


def test_a_read_that_fails_leaves_nothing_in_host_memory(tmp_path: Path) -> None:
    path = write_checkpoint("shared1", tmp_path) / "model.safetensors"
    store, shape = make_store(tmp_path, host_experts=1)
    memory = spare(shape)
    exhaust(store.fetch(0, 1, memory))
    whole, times = path.read_bytes(), path.stat()
    steps = store.fetch(0, 2, memory)
    next(steps)
    os.truncate(path, 20_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*experts\.2.* was truncated"):
        exhaust(steps)
    assert len(store.host) == 0  # what made room for the expert is gone, and nothing half read
    with pytest.raises(CheckpointError, match="20000 bytes; it had"):
        exhaust(store.fetch(0, 1, memory))
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    got, _ = exhaust(store.fetch(0, 1, memory))
    assert got is not memory and len(store.host) == 1


def test_a_fetch_that_is_given_up_gives_its_memory_back(directory: Path) -> None:
    store, shape = make_store(directory, host_experts=1)
    steps = store.fetch(0, 1, spare(shape))
    next(steps)
    steps.close()
    assert len(store.host) == 0
    got, _ = exhaust(store.fetch(0, 2, spare(shape)))
    assert len(store.host) == 1 and store.counts.disk_reads == 1


def test_memory_still_being_copied_from_is_waited_for(directory: Path) -> None:
    store, shape = make_store(directory)
    memory, waited = spare(shape), []

    class Event:
        def synchronize(self) -> None:
            waited.append(memory.w13.values.any().item())

    memory.in_flight = Event()  # type: ignore[assignment]
    exhaust(store.fetch(0, 1, memory))
    assert waited == [False] and memory.in_flight is None
