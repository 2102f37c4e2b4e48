"""Parts of the plugin that need no engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin import POOL_ROW_ARG, worker_cls_for
from emo_serve.vllm_plugin.backends import CpuBackend, ReferenceBackend, choose_backend
from emo_serve.vllm_plugin.batch_pools import PoolRows, pool_row_of

CPU = torch.device("cpu")


def test_pool_row_of_a_request() -> None:
    assert pool_row_of(SimpleNamespace(extra_args={POOL_ROW_ARG: 3})) == 3
    assert pool_row_of(SimpleNamespace(extra_args={"other": 3})) == 0
    assert pool_row_of(SimpleNamespace(extra_args=None)) == 0
    assert pool_row_of(None) == 0


def test_one_row_a_token_and_padding_is_the_base_pools() -> None:
    rows = PoolRows(10, CPU)
    first = rows.fill(np.array([4, 2, 7]), np.array([0, 3, 4, 6]))
    assert first.tolist() == [4, 4, 4, 2, 7, 7, 0, 0, 0, 0]
    second = rows.fill(np.array([5]), np.array([0, 1]))
    assert second.tolist() == [5, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert first.data_ptr() == second.data_ptr(), "CUDA graphs need one address"


def test_worker_classes() -> None:
    assert worker_cls_for("cpu").endswith("EmoCpuWorker")
    assert worker_cls_for("cuda").endswith("EmoGpuWorker")
    with pytest.raises(ConfigError, match="'tpu' is not served"):
        worker_cls_for("tpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 130])
def test_cpu_backend_equals_reference(num_tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    x_TD = draw(num_tokens, 64).to(dtype)
    w13, w2 = draw(6, 64, 64).to(dtype), draw(6, 64, 32).to(dtype)
    slots_TK = torch.rand(num_tokens, 6, generator=generator).argsort(-1)[:, :3].int()
    weights_TK = torch.rand(num_tokens, 3, generator=generator)
    weights_TK[0, 0] = 0.0  # what routing gives when a pool is smaller than top-k
    cpu = CpuBackend()
    packed = [torch.empty_like(w) for w in (w13, w2)]
    for w, slab in zip((w13, w2), packed, strict=True):
        for slot in range(len(w)):
            cpu.pack_into(slab[slot], w[slot])
    expected = ReferenceBackend()(x_TD.double(), weights_TK, slots_TK, w13.double(), w2.double())
    for backend, slabs in ((cpu, packed), (ReferenceBackend(), [w13, w2])):
        got = backend(x_TD, weights_TK, slots_TK, *slabs)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_can_be_packed_in_parts(dtype: torch.dtype) -> None:
    weight = torch.randn(160, 96).to(dtype)
    for backend in (CpuBackend(), ReferenceBackend()):
        whole, parts = torch.empty_like(weight), torch.empty_like(weight)
        backend.pack_into(whole, weight)
        for rows in (slice(0, backend.row_block), slice(backend.row_block, 160)):
            backend.pack_into(parts[rows], weight[rows])
        assert torch.equal(parts, whole)
        assert torch.equal(whole, weight) == backend.keeps_layout


def test_choice_of_backend() -> None:
    assert choose_backend("auto", CPU, 128, 64).name == "cpu"
    assert choose_backend("auto", CPU, 128, 48).name == "reference"  # 48 is no multiple of 32
    assert choose_backend("auto", torch.device("cuda"), 128, 64).name == "reference"
    assert choose_backend("reference", CPU, 128, 64).name == "reference"
    with pytest.raises(ConfigError, match="each rank 48"):
        choose_backend("cpu", CPU, 128, 48)
    with pytest.raises(ConfigError, match="'fast' is unknown"):
        choose_backend("fast", CPU, 128, 64)
