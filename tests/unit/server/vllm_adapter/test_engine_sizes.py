"""What vLLM's flags mean in bytes on a CPU, by vLLM's own formulas and choice of memory nodes."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.cpu_resource_utils import LogicalCPUInfo, MemoryNodeInfo
from vllm.v1.worker.cpu_worker import CPUWorker

from emo_serve.config import GIB
from emo_serve.errors import ConfigError
from emo_serve.server.vllm_adapter import engine_sizes as module
from emo_serve.server.vllm_adapter.engine_sizes import engine_sizes, memory_nodes
from emo_serve.server.vllm_adapter.flags import parse_serve_args, with_values
from emo_serve.server.vllm_adapter.sizes import CpuSizes, MemoryShare
from emo_serve.vllm_plugin import register
from tests.support.golden.checkpoints import write_checkpoint

TOKEN_BYTES = 3 * 2 * 4 * 32  # layers, key and value, heads, head width; one byte each


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return write_checkpoint("shared1", tmp_path_factory.mktemp("model") / "shared1")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(module.current_platform, "is_cpu", lambda: True)


def parsed(directory: Path, *flags: str) -> argparse.Namespace:
    args = parse_serve_args([str(directory), *flags], {})
    return with_values(args, model=str(directory))


def sizes_of(directory: Path, *flags: str) -> CpuSizes:
    cpu = engine_sizes(parsed(directory, *flags)).cpu
    assert cpu is not None
    return cpu


def test_the_cache_is_sized_by_the_model_and_the_flags(directory: Path) -> None:
    plain = sizes_of(directory, "--dtype", "float32")
    assert (plain.block_tokens, plain.block_bytes) == (128, 128 * TOKEN_BYTES * 4)
    assert (plain.max_model_len, plain.max_num_seqs) == (512, 128)
    assert (plain.kv_flag, plain.kv_bytes, plain.share) == (None, None, None)
    others = ("--block-size", "32", "--max-model-len", "256", "--max-num-seqs", "7")
    other = sizes_of(directory, "--dtype", "bfloat16", *others)
    assert (other.block_tokens, other.block_bytes) == (32, 32 * TOKEN_BYTES * 2)
    assert (other.max_model_len, other.max_num_seqs) == (256, 7)
    narrow = sizes_of(directory, "--dtype", "float32", "--kv-cache-dtype", "fp8")
    assert narrow.block_bytes == 128 * TOKEN_BYTES
    half = sizes_of(directory, "--dtype", "float32", "--tensor-parallel-size", "2")
    assert half.block_bytes == plain.block_bytes // 2


def test_the_cache_is_divided_among_the_stages_by_their_layers(directory: Path) -> None:
    plain = sizes_of(directory, "--dtype", "float32")
    flags = ("--dtype", "float32", "--pipeline-parallel-size", "2", "--tensor-parallel-size", "2")
    sizes = engine_sizes(parsed(directory, *flags))
    assert sizes.cpu is not None and sizes.cpu.block_bytes == plain.block_bytes // 2
    assert len(sizes.cpu.nodes) in (0, 4)
    assert (sizes.num_ranks, sizes.layers_per_stage, sizes.num_workers) == (2, (2, 1), 4)
    assert sizes.kv_bytes_of_one(2 * 3 * 512) == 2 * 512, "the longest stage has two of three"
    assert sizes.kv_bytes_of_all(2 * 512) == 2 * 3 * 512
    with pytest.raises(ConfigError, match="is 4, and the model has 3 layers; each stage needs one"):
        engine_sizes(parsed(directory, "--pipeline-parallel-size", "4"))


def test_another_device_divides_its_own_memory(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(module.current_platform, "is_cpu", lambda: False)
    sizes = engine_sizes(parsed(directory, "--dtype", "float32"))
    assert (sizes.dtype_bytes, sizes.num_ranks, sizes.cpu) == (4, 1, None)


def test_what_vllm_refuses_is_refused_in_one_line(directory: Path) -> None:
    with pytest.raises(ConfigError, match="vLLM refuses these flags: "):
        engine_sizes(parsed(directory, "--max-model-len", "100000"))


def test_a_cache_that_the_user_gives_is_taken(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    given = sizes_of(directory, "--kv-cache-memory-bytes", "64M")
    assert (given.kv_flag, given.kv_bytes) == ("--kv-cache-memory-bytes", 64 * 2**20)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")  # vLLM lets it win
    given = sizes_of(directory, "--kv-cache-memory-bytes", "64M")
    assert (given.kv_flag, given.kv_bytes) == ("VLLM_CPU_KVCACHE_SPACE", 3 * GIB)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3.5")
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE is '3.5'; give whole GiB"):
        sizes_of(directory)


@pytest.mark.parametrize("share", ["0.5", "0.92"])
def test_a_share_counts_only_if_the_user_gives_it(
    monkeypatch: pytest.MonkeyPatch, directory: Path, share: str
) -> None:
    node = MemoryNodeInfo(10 * GIB, 9 * GIB)
    monkeypatch.setattr(module, "get_memory_node_info", lambda number: node)
    flag = f"--gpu-memory-utilization {share}"
    asked = sizes_of(directory, *flag.split()).share
    assert asked is not None
    assert asked == MemoryShare(flag, asked.asked_bytes, 9 * GIB)
    assert asked.asked_bytes == pytest.approx(float(share) * 10 * GIB)
    both = (*flag.split(), "--kv-cache-memory-bytes", "1G")
    assert sizes_of(directory, *both).share is None
    default = parsed(directory).gpu_memory_utilization
    assert default == 0.92  # vLLM's own, which other devices go by


@pytest.mark.parametrize(
    ("binding", "allowed", "expected"),
    [
        ("auto", [0], (0, 0)),
        ("auto", [0, 1], (0, 1)),
        ("auto", [1], (1, 1)),
        ("nobind", [0, 1], (0, 0)),
        ("2-3|0,1", [0, 1], (1, 0)),
        ("0,3|2", [1], (1, 1)),
        ("7|2", [0, 1], (0, 1)),
        ("auto", [], ()),
    ],
)
def test_each_worker_is_bound_to_the_node_of_its_first_cpu(
    monkeypatch: pytest.MonkeyPatch, binding: str, allowed: list[int], expected: tuple[int, ...]
) -> None:
    cpus = [LogicalCPUInfo(id=cpu, physical_core=cpu, numa_node=cpu // 2) for cpu in range(4)]
    monkeypatch.setattr(module, "get_visible_memory_node", lambda: allowed)
    monkeypatch.setattr(module, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    assert memory_nodes(2) == expected
    assert memory_nodes(1) == expected[:1]


def test_workers_do_what_is_repeated_here() -> None:
    bind, cache = inspect.getsource(CPUWorker.__init__), inspect.getsource(CpuPlatform)
    assert "init_cpu_memory_env([memory_node])" in bind
    assert "cpu_core = allowed_cpu_list[0]" in bind
    assert "cache_config.block_size = 128" in cache
    assert 'env_key = "VLLM_CPU_KVCACHE_SPACE"' in cache
    check = inspect.getsource(CPUWorker.determine_available_memory)
    assert "explicit_kv_cache_size = self.cache_config.kv_cache_memory_bytes" in check
