"""Routing and expert maths over a slab of slots: the kernels behind `PooledExperts`.

A backend takes a layer's gate logits and computes with slot ids; the tables tell which expert sits
in which slot. The backend decides how weights lie in the slab (`pack_into`).

Shapes: T tokens, D hidden size, F expert width on this rank, E experts, S slots, K experts a token
takes.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import emo_kernels
from emo_kernels import PoolTables, Router
from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin.contract import (
    EXPERT_DTYPES,
    MOE_BACKENDS,
    check_expert_dtype,
    device_obstacle,
)
from emo_serve.vllm_plugin.cpu_backend import CpuBackend
from emo_serve.vllm_plugin.packed import PackedMatrix, Slab
from emo_serve.vllm_plugin.slot_routing import route_to_slots

__all__ = [
    "MoeBackend",
    "ReferenceBackend",
    "TritonBackend",
    "TritonFp8Backend",
    "choose_backend",
]

_LOG = logging.getLogger(__name__)


class MoeBackend(Protocol):
    """Compute a MoE layer from slots.

    A matrix may be packed in parts whose rows are a multiple of `row_block`: the bytes are those of
    packing it whole. `keeps_layout` says that packing only copies, at most into another dtype.
    """

    name: str
    row_block: int
    keeps_layout: bool

    def slab_dtype(self, activations: torch.dtype) -> torch.dtype:
        """Return the dtype of weights in slots for activations of this dtype."""

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        """Write rows of an expert's matrix, in any floating dtype, as the slab stores them."""

    def __call__(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        pool_rows_T: Tensor,
        tables: PoolTables,
        router: Router,
        slab: Slab,
    ) -> Tensor:
        """Route each token inside its pool; return the weighted sum of its experts, [T, D].

        Tokens whose pool row is -1 are padding; their results are never read.
        """


class _PlainLayout:
    """Slots hold the checkpoint's rows as they are, in the activations' dtype."""

    row_block = 1
    keeps_layout = True

    def slab_dtype(self, activations: torch.dtype) -> torch.dtype:
        return activations

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        out.values.copy_(weight)


class ReferenceBackend(_PlainLayout):
    """Plain torch for any device and shape; synchronises with the host, so no CUDA graphs."""

    name = "reference"

    def __call__(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        pool_rows_T: Tensor,
        tables: PoolTables,
        router: Router,
        slab: Slab,
    ) -> Tensor:
        weights_TK, slots_TK = route_to_slots(logits_TE, pool_rows_T, tables, router)
        return self.compute(x_TD, weights_TK, slots_TK, slab)

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D]."""
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        taken_TK = weights_TK != 0
        for slot in torch.unique(slots_TK[taken_TK]).tolist():  # sync: the slots the batch chose
            tokens, places = ((slots_TK == slot) & taken_TK).nonzero(as_tuple=True)
            expert = slab.slot(slot)
            gate, up = (x_TD[tokens] @ expert.w13.values.t()).chunk(2, -1)
            rows = (F.silu(gate) * up) @ expert.w2.values.t()
            y_TD.index_add_(0, tokens, rows.float() * weights_TK[tokens, places, None])
        return y_TD.to(x_TD.dtype)


class TritonBackend(_PlainLayout):
    """emo_kernels: CUDA of compute capability 8.0 or more; never synchronises with the host."""

    name = "triton"
    alignment = 16  # emo_kernels.grouped_gemm: hidden and expert sizes must be multiples
    capability = (8, 0)

    def __call__(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        pool_rows_T: Tensor,
        tables: PoolTables,
        router: Router,
        slab: Slab,
    ) -> Tensor:
        w13, w2 = slab.w13, slab.w2
        scales = None
        if w13.scales is not None and w2.scales is not None:
            scales = (w13.scales, w2.scales)
        return emo_kernels.pooled_moe(
            x_TD, logits_TE, pool_rows_T, tables, router, w13.values, w2.values, scales
        )


class TritonFp8Backend(TritonBackend):
    """The same kernels on slots of fp8 weights, which are quantised as they are packed."""

    keeps_layout = False
    _block_rows = 64  # half a MiB of EMO's rows in fp32, so that a pass over them stays in L2

    def slab_dtype(self, activations: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        assert out.scales is not None
        for start in range(0, len(out), self._block_rows):
            block = slice(start, start + self._block_rows)
            values, scales = emo_kernels.quantize(weight[block])
            out.values[block].copy_(values)
            out.scales[block].copy_(scales)


# -- choice --


def choose_backend(
    name: str,
    device: torch.device,
    hidden_size: int,
    width: int,
    dtype: torch.dtype,
    expert_dtype: str = EXPERT_DTYPES[0],
) -> MoeBackend:
    """Return the backend called `name`; `auto` is the fastest that can run here.

    `width` is an expert's width on this rank, `dtype` that of the activations. Raises ConfigError
    if the named backend cannot run here, or no backend here can hold experts in `expert_dtype`.
    """
    if name not in MOE_BACKENDS:
        raise ConfigError(
            f"--moe-backend {name!r} is unknown; use one of {', '.join(MOE_BACKENDS)}"
        )
    check_expert_dtype(expert_dtype, name, device.type)
    is_fp8 = expert_dtype != EXPERT_DTYPES[0]
    chosen = name
    if name == "auto":
        chosen = "triton" if device.type == "cuda" else "cpu"
    obstacle = device_obstacle(chosen, device.type)
    if obstacle is None and chosen == "cpu":
        obstacle = _misaligned("cpu", CpuBackend.alignment, hidden_size, width)
    elif obstacle is None and chosen == "triton":
        obstacle = _obstacle_to_triton(device, hidden_size, width, dtype)
    if obstacle is not None:
        if is_fp8:
            raise ConfigError(
                f"{obstacle}; --expert-dtype {expert_dtype} needs triton: leave --expert-dtype out"
            )
        if name != "auto":
            raise ConfigError(f"{obstacle}; use --moe-backend reference")
        _LOG.warning(
            "--moe-backend auto is falling back to the slow reference backend: %s", obstacle
        )
        chosen = "reference"
    if chosen == "triton":
        return TritonFp8Backend() if is_fp8 else TritonBackend()
    return CpuBackend.of(dtype) if chosen == "cpu" else ReferenceBackend()


def _obstacle_to_triton(
    device: torch.device, hidden_size: int, width: int, dtype: torch.dtype
) -> str | None:
    if device.type == "cuda":
        found, least = torch.cuda.get_device_capability(device), TritonBackend.capability
        if found < least:
            return (
                f"--moe-backend triton needs compute capability {_dotted(least)}; the device has"
                f" {_dotted(found)}"
            )
    elif dtype == torch.bfloat16:  # the interpreter multiplies bfloat16 wrongly
        return "--moe-backend triton in Triton's interpreter needs --dtype float32 or float16"
    return _misaligned("triton", TritonBackend.alignment, hidden_size, width)


def _misaligned(name: str, alignment: int, hidden_size: int, width: int) -> str | None:
    if hidden_size % alignment == 0 and width % alignment == 0:
        return None
    return (
        f"--moe-backend {name} needs sizes divisible by {alignment}; hidden_size is {hidden_size},"
        f" an expert's width on each rank {width} (an expert's width divided by"
        " --tensor-parallel-size)"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
