"""Backends and the layer around them, without an engine: who is chosen, and that all agree."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emo_kernels import PoolTables, Router
from emo_kernels.cpu import CpuExperts, may_use_tiles
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.routing import route
from emo_serve.errors import ConfigError
from emo_serve.facts import MoeLayer
from emo_serve.vllm_plugin.backends import (
    MoeBackend,
    ReferenceBackend,
    TritonBackend,
    TritonFp8Backend,
    choose_backend,
)
from emo_serve.vllm_plugin.batch_pools import PADDING_ROW
from emo_serve.vllm_plugin.contract import MOE_BACKENDS, PluginSettings, expert_bytes
from emo_serve.vllm_plugin.cpu_backend import CpuBackend, VllmCpuBackend
from emo_serve.vllm_plugin.moe import PooledMoE
from emo_serve.vllm_plugin.packed import ExpertShape, Slab

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: CPU tensors"
)
needs_amx = pytest.mark.skipif(not may_use_tiles(), reason="needs a CPU with AMX")


def ours(dtype: torch.dtype, name: str, *, tiles: bool = True) -> Any:
    """Return the parameter of our kernel for CPUs, skipped where it cannot run."""
    experts = CpuExperts.of(dtype, tiles=tiles)
    mark = pytest.mark.skipif(experts is None, reason="needs AVX-512 and a C++ compiler")
    backend = CpuBackend(experts) if experts else None
    return pytest.param(backend, *([dtype] if name else []), marks=mark, id=f"ours{name}")


BACKENDS = (
    ReferenceBackend(),
    ours(torch.float32, ""),
    pytest.param(VllmCpuBackend(), id="vllm-cpu"),
    pytest.param(TritonBackend(), marks=needs_interpreter, id="triton"),
    pytest.param(TritonFp8Backend(), marks=needs_interpreter, id="triton-fp8"),
)
BACKENDS_16BIT = (  # the kernel for CPUs knows no float16, the interpreter's products no bfloat16
    pytest.param(ReferenceBackend(), torch.bfloat16, id="reference-bfloat16"),
    pytest.param(VllmCpuBackend(), torch.bfloat16, id="vllm-cpu-bfloat16"),
    ours(torch.bfloat16, "-bfloat16"),
    ours(torch.bfloat16, "-bfloat16-without-tiles", tiles=False),
    pytest.param(TritonBackend(), torch.float16, marks=needs_interpreter, id="triton-float16"),
    pytest.param(TritonFp8Backend(), torch.float16, marks=needs_interpreter, id="triton-fp8"),
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

HIDDEN, WIDTH = 64, 32
LAYERS = {
    "shared": MoeLayer(num_experts=8, num_shared_experts=1, always_active=(), top_k=4),
    "plain": MoeLayer(num_experts=8, num_shared_experts=0, always_active=(), top_k=3),
    "always-active": MoeLayer(num_experts=8, num_shared_experts=0, always_active=(2, 5), top_k=4),
    "few experts": MoeLayer(num_experts=3, num_shared_experts=1, always_active=(), top_k=3),
}


@dataclass
class Batch:
    """Tokens of several pools, the last ones padding, and the experts as the checkpoint has them.

    w13_E and w2_E are by expert id; `slots` says where each goes.
    """

    moe: MoeLayer
    x_TD: Tensor
    logits_TE: Tensor
    pool_rows_T: Tensor
    members_PE: Tensor
    temperatures_P: Tensor
    slots: list[int]
    w13_E: Tensor
    w2_E: Tensor

    @property
    def router(self) -> Router:
        moe = self.moe
        return Router(
            moe.num_experts,
            moe.top_k,
            moe.num_shared_experts,
            moe.always_active,
            renormalize=not moe.implied,
        )

    def tables(self) -> PoolTables:
        return PoolTables(
            self.members_PE, self.temperatures_P, torch.tensor(self.slots, dtype=torch.int32)
        )

    def check(self, got_TD: Tensor) -> None:
        """Compare with the maths in float64, one token and one expert at a time; not padding."""
        rows_T = self.pool_rows_T.clamp_min(0)
        routing = route(
            self.logits_TE,
            self.moe,
            self.members_PE[rows_T],
            self.temperatures_P[rows_T, None],
            norm_topk_prob=not self.moe.implied,
        )
        y_TD = torch.zeros(self.x_TD.shape, dtype=torch.float64)
        for token in range(len(self.x_TD)):
            taken = zip(routing.experts_TK[token], routing.weights_TK[token], strict=True)
            for expert, weight in taken:
                gate, up = (self.w13_E[expert].double() @ self.x_TD[token].double()).chunk(2)
                y_TD[token] += weight * (self.w2_E[expert].double() @ (F.silu(gate) * up))
        tolerance = TOLERANCE[self.x_TD.dtype]
        live_T = self.pool_rows_T != PADDING_ROW
        torch.testing.assert_close(
            got_TD[live_T].double(), y_TD[live_T], atol=tolerance, rtol=tolerance
        )


def draw_batch(moe: MoeLayer, num_tokens: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    experts = moe.num_experts
    members_PE = torch.ones(3, experts, dtype=torch.bool)
    members_PE[1, ::2] = False
    members_PE[2, 1:] = False  # fewer than any token takes
    pool_rows_T = torch.arange(num_tokens) % 3
    pool_rows_T[num_tokens - num_tokens // 4 :] = PADDING_ROW
    return Batch(
        moe=moe,
        x_TD=draw(num_tokens, HIDDEN).to(dtype),
        logits_TE=draw(num_tokens, experts).to(dtype) * 5,
        pool_rows_T=pool_rows_T,
        members_PE=members_PE,
        temperatures_P=torch.tensor([1.0, 0.5, 2.0]),
        slots=torch.randperm(experts, generator=generator).tolist(),
        w13_E=draw(experts, 2 * WIDTH, HIDDEN).to(dtype),
        w2_E=draw(experts, HIDDEN, WIDTH).to(dtype),
    )


def pack(backend: MoeBackend, batch: Batch, slab: Slab) -> Batch:
    """Fill the slots; return the batch with the weights that they stand for."""
    held = replace(batch, w13_E=batch.w13_E.clone(), w2_E=batch.w2_E.clone())
    for expert, number in enumerate(batch.slots):
        slot = slab.slot(number)
        for packed, weights in ((slot.w13, held.w13_E[expert]), (slot.w2, held.w2_E[expert])):
            backend.pack_into(packed, weights)
            if packed.scales is not None:
                weights.copy_(packed.values.float() * packed.scales[:, None])
    return held


def run(backend: MoeBackend, batch: Batch) -> tuple[Tensor, Batch]:
    slab = ExpertShape(HIDDEN, WIDTH, backend.slab_dtype(batch.x_TD.dtype)).slab(len(batch.slots))
    held = pack(backend, batch, slab)
    x_TD, logits_TE, rows_T = batch.x_TD, batch.logits_TE, batch.pool_rows_T
    return backend(x_TD, logits_TE, rows_T, batch.tables(), batch.router, slab), held


# -- what they compute --


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_16BIT)
def test_each_token_gets_the_experts_of_its_pool(
    backend: MoeBackend, dtype: torch.dtype, layer: str
) -> None:
    got, held = run(backend, draw_batch(LAYERS[layer], num_tokens=9, dtype=dtype))
    held.check(got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", ["plain", "always-active"])
def test_what_is_outside_a_pool_is_never_computed_with(backend: MoeBackend, layer: str) -> None:
    """Not even times 0: an expert may be nan, and a pool smaller than what a token takes."""
    batch = draw_batch(LAYERS[layer], num_tokens=9)
    batch.members_PE[:2, 0] = False
    batch.members_PE[0, 1:] = False  # with expert 0 outside, too, row 0 has nothing of its own
    batch.members_PE[0, 3] = True
    batch.pool_rows_T[:] = torch.arange(9) % 2
    got, _ = run(backend, batch)
    spoilt = replace(batch, w13_E=batch.w13_E.clone(), w2_E=batch.w2_E.clone())
    outside = ~batch.members_PE[:2].any(0)
    outside[list(batch.moe.always_active)] = False
    assert outside[0]
    spoilt.w13_E[outside] = float("nan")
    spoilt.w2_E[outside] = float("nan")
    answers, _ = run(backend, spoilt)
    assert torch.equal(answers, got) and got.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 5, 130])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(VllmCpuBackend(), torch.float32, id="vllm-cpu"),
        ours(torch.float32, "-float32"),
        ours(torch.bfloat16, "-bfloat16"),
        ours(torch.bfloat16, "-bfloat16-without-tiles", tiles=False),
    ],
)
def test_cpu_backends_at_other_sizes(
    backend: MoeBackend, dtype: torch.dtype, num_tokens: int
) -> None:
    got, held = run(backend, draw_batch(LAYERS["shared"], num_tokens, dtype))
    held.check(got)


@needs_amx
def test_a_process_that_has_multiplied_nothing_yet_may_use_tiles() -> None:
    """Without asking Linux it ends with SIGILL."""
    program = (
        "import torch\n"
        "from emo_kernels.cpu import CpuExperts\n"
        "from emo_serve.vllm_plugin.packed import ExpertShape\n"
        "experts = CpuExperts.of(torch.bfloat16)\n"
        "slab = ExpertShape(64, 32, torch.bfloat16).slab(2)\n"
        "slab.w13.values.zero_(); slab.w2.values.zero_()\n"
        "x = torch.ones(3, 64).bfloat16()\n"
        "ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)\n"
        "assert not experts(x, weights, ids, slab.w13.values, slab.w2.values).any()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_can_be_packed_in_parts(dtype: torch.dtype) -> None:
    weight = torch.randn(160, 96).to(dtype)
    by_dtype = CpuBackend.of(dtype)
    for backend in (
        *(VllmCpuBackend(), by_dtype, ReferenceBackend(), TritonBackend(), TritonFp8Backend()),
    ):
        whole, parts = (ExpertShape(96, 80, backend.slab_dtype(dtype)).slab(1).w13[0] for _ in "12")
        backend.pack_into(whole, weight)
        for rows in (slice(0, backend.row_block), slice(backend.row_block, 160)):
            backend.pack_into(parts[rows], weight[rows])
        assert all(map(torch.equal, parts.tensors(), whole.tensors()))
        assert torch.equal(whole.values.to(dtype), weight) == backend.keeps_layout


# -- the layer --


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_layer_routes_by_the_tables_as_they_are_now(
    one_rank: None, backend: MoeBackend, layer: str
) -> None:
    batch = draw_batch(LAYERS[layer], num_tokens=12)
    config = EmoConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_shared_experts=0,
        norm_topk_prob=batch.router.renormalize,
    )
    settings = PluginSettings(num_slots=99, num_pools=3)
    moe = PooledMoE(config.facts, batch.moe, settings, backend, f"{backend.name}.{layer}")
    batch = pack(backend, batch, moe.slab)
    expert_dtype = "fp8_e4m3" if isinstance(backend, TritonFp8Backend) else "auto"
    assert moe.slot_bytes == expert_bytes(HIDDEN, WIDTH, expert_dtype, dtype_bytes=4)
    moe.map_experts(range(batch.moe.num_experts), batch.slots)
    for row, members_E in enumerate(batch.members_PE):
        moe.publish(row, members_E.nonzero()[:, 0].tolist(), float(batch.temperatures_P[row]))
    places = [tensor.data_ptr() for tensor in moe.buffers()]

    got = moe.compute(batch.x_TD, batch.logits_TE, batch.pool_rows_T)
    batch.check(got)
    if backend.name == "triton":
        assert not got[batch.pool_rows_T == PADDING_ROW].any()

    batch.members_PE[1], batch.temperatures_P[1] = True, 1.0
    moe.publish(1, range(batch.moe.num_experts), 1.0)
    batch.check(moe.compute(batch.x_TD, batch.logits_TE, batch.pool_rows_T))
    assert [t.data_ptr() for t in moe.buffers()] == places, "CUDA graphs need one address"


# -- choice --


def choice(
    name: str,
    device: torch.device = CPU,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    expert_dtype: str = "auto",
) -> str:
    backend = choose_backend(name, device, 128, width, dtype, expert_dtype)
    is_fp8 = backend.slab_dtype(dtype) == torch.float8_e4m3fn
    assert is_fp8 == (expert_dtype == "fp8_e4m3")
    return backend.name


def give_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for interpret in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        assert choice("auto") == "cpu"  # the interpreter is for who asks for it
    assert not caplog.records
    assert choice("auto", width=48) == "reference"  # 48 is no multiple of 32
    assert (
        "falling back to the slow reference backend" in caplog.text
        and "each rank 48" in caplog.text
    )
    assert choice("reference") == "reference"
    with pytest.raises(ConfigError, match="each rank 48.*use --moe-backend reference"):
        choice("cpu", width=48)


def test_without_a_compiler_vllms_operation_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("emo_kernels.cpu._library", lambda: None)
    backend = choose_backend("auto", CPU, 128, 64, torch.bfloat16)
    assert isinstance(backend, VllmCpuBackend)
    assert "a C++ compiler" in caplog.text


def test_float16_is_left_to_vllms_operation() -> None:
    assert isinstance(CpuBackend.of(torch.float16), VllmCpuBackend)


def test_triton_on_a_cpu_is_the_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choice("triton") == "triton"
    assert choice("triton", dtype=torch.float16) == "triton"
    with pytest.raises(ConfigError, match="--dtype float32 or float16"):
        choice("triton", dtype=torch.bfloat16)
    for interpret in ("0", ""):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with pytest.raises(ConfigError, match="needs a CUDA device; .*TRITON_INTERPRET=1"):
            choice("triton")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 1)])
def test_choice_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    give_capability(monkeypatch, capability)
    assert choice("auto", CUDA, dtype=torch.bfloat16) == "triton"
    assert choice("triton", CUDA, dtype=torch.bfloat16) == "triton"
    assert choice("reference", CUDA) == "reference"
    assert choice("auto", CUDA, width=8) == "reference"
    with pytest.raises(
        ConfigError, match="divisible by 16; .*each rank 8 .*--tensor-parallel-size"
    ):
        choice("triton", CUDA, width=8)
    with pytest.raises(ConfigError, match="cpu needs a CPU; the device is cuda"):
        choice("cpu", CUDA)


def test_choice_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    give_capability(monkeypatch, (7, 5))
    assert choice("auto", CUDA) == "reference"
    with pytest.raises(ConfigError, match="needs compute capability 8.0; the device has 7.5"):
        choice("triton", CUDA)


def test_fp8_experts_are_for_our_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fp8(name: str, device: torch.device, **options: Any) -> str:
        return choice(name, device, expert_dtype="fp8_e4m3", **options)

    give_capability(monkeypatch, (8, 0))
    assert fp8("auto", CUDA, dtype=torch.bfloat16) == "triton"
    assert fp8("triton", CUDA, dtype=torch.bfloat16) == "triton"
    with pytest.raises(ConfigError, match="--moe-backend is reference and the device is cuda; lea"):
        fp8("reference", CUDA)
    for name in ("auto", "triton"):
        with pytest.raises(ConfigError, match="each rank 8 .*--expert-dtype fp8_e4m3 needs triton"):
            fp8(name, CUDA, width=8)
    give_capability(monkeypatch, (7, 5))
    with pytest.raises(
        ConfigError, match="the device has 7.5; --expert-dtype fp8_e4m3 needs triton"
    ):
        fp8("auto", CUDA)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fp8("triton", CPU) == "triton"
    for name in ("auto", "cpu", "reference"):
        with pytest.raises(ConfigError, match=f"--moe-backend is {name} and the device is cpu"):
            fp8(name, CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="needs --moe-backend triton on a CUDA device"):
        fp8("triton", CPU)


def test_every_name_of_the_flag_is_known_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in set(MOE_BACKENDS) - {"auto"}:
        assert choice(name) == name
    with pytest.raises(ConfigError, match="'fast' is unknown; use one of auto, triton, cpu"):
        choice("fast")
