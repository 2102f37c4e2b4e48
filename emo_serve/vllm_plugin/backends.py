"""Expert maths over a slab of slots: the kernels behind `PooledMoE`.

A backend owns how weights lie in the slab (`pack_into`) and computes with slot ids only; which
expert sits in which slot is not its business.

Shapes: T tokens, D hidden size, F expert width on this rank, S slots, K experts a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from emo_serve.errors import ConfigError

__all__ = ["CpuBackend", "MoeBackend", "ReferenceBackend", "choose_backend"]


class MoeBackend(Protocol):
    """Compute experts from slots.

    A matrix can be packed in parts of `row_block` rows, or a multiple: each gives the bytes that it
    has in the whole. `keeps_layout` tells that packing is copying.
    """

    name: str
    row_block: int
    keeps_layout: bool

    def pack_into(self, out: Tensor, weight: Tensor) -> None:
        """Write rows of an expert's matrix as the slab stores them; both contiguous, alike."""

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        """Return the weighted sum over K of each token's experts, [T, D].

        w13 [S, 2F, D] holds gate rows, then up rows; w2 [S, D, F]. weights_TK fp32, slots_TK int32.
        """


class ReferenceBackend:
    """Plain torch, any device and shape; one host sync a call, so no CUDA graphs."""

    name = "reference"
    row_block = 1
    keeps_layout = True

    def pack_into(self, out: Tensor, weight: Tensor) -> None:
        out.copy_(weight)

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for slot in torch.unique(slots_TK).tolist():  # sync: the slots the batch chose
            tokens, places = (slots_TK == slot).nonzero(as_tuple=True)
            gate, up = (x_TD[tokens] @ w13[slot].t()).chunk(2, -1)
            rows = (F.silu(gate) * up) @ w2[slot].t()
            y_TD.index_add_(0, tokens, rows.float() * weights_TK[tokens, places, None])
        return y_TD.to(x_TD.dtype)


class CpuBackend:
    """vLLM's grouped GEMM for CPUs (vllm._custom_ops.cpu_fused_moe), portable vector variant."""

    name = "cpu"
    alignment = 32  # vllm 0.32.0, fused_moe/experts/cpu_moe.py: output_alignment
    row_block = alignment
    keeps_layout = False

    def __init__(self) -> None:
        from vllm import _custom_ops

        self._ops = _custom_ops

    def pack_into(self, out: Tensor, weight: Tensor) -> None:
        # vLLM's cpu_prepack_moe_weight, but into memory that is there.
        torch.ops._C.prepack_moe_weight(weight[None], out[None], "vec")

    def __call__(
        self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        self._ops.cpu_fused_moe(
            y_TD, x_TD, w13, w2, None, None, weights_TK, slots_TK, "silu", "vec"
        )
        return y_TD


def choose_backend(name: str, device: torch.device, hidden_size: int, width: int) -> MoeBackend:
    """Return the backend called `name`; `auto` is the fastest that can run here.

    `width` is an expert's width on this rank. Raises ConfigError when the named one cannot run.
    """
    aligned = hidden_size % CpuBackend.alignment == 0 and width % CpuBackend.alignment == 0
    if name == "auto":
        name = "cpu" if device.type == "cpu" and aligned else "reference"
    if name == "reference":
        return ReferenceBackend()
    if name != "cpu":
        raise ConfigError(f"--moe-backend {name!r} is unknown; use auto, cpu or reference")
    if device.type != "cpu" or not aligned:
        raise ConfigError(
            f"--moe-backend cpu needs a CPU and sizes divisible by {CpuBackend.alignment}; here"
            f" the device is {device.type}, hidden_size {hidden_size} and an expert's width on"
            f" each rank {width}; use --moe-backend reference"
        )
    return CpuBackend()
