"""Expert maths on a CPU over packed slots: our kernel where it runs, else vLLM's grouped GEMM."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from emo_kernels import PoolTables, Router
from emo_kernels.cpu import CpuExperts, may_use_tiles
from emo_serve.vllm_plugin.packed import PackedMatrix, Slab
from emo_serve.vllm_plugin.slot_routing import route_to_slots

__all__ = ["CpuBackend", "VllmCpuBackend"]

_LOG = logging.getLogger(__name__)


class _PackedOnCpu:
    """What both have in common: experts packed in the activations' dtype."""

    name = "cpu"
    alignment = 32  # of hidden and expert sizes: vLLM's (0.32.0, experts/cpu_moe.py), and ours
    row_block = alignment
    keeps_layout = False

    def slab_dtype(self, activations: torch.dtype) -> torch.dtype:
        """Return the activations' dtype."""
        return activations

    def __call__(
        self,
        x_TD: Tensor,
        logits_TE: Tensor,
        pool_rows_T: Tensor,
        tables: PoolTables,
        router: Router,
        slab: Slab,
    ) -> Tensor:
        """Route each token inside its pool; return the weighted sum of its experts, [T, D]."""
        weights_TK, slots_TK = self.route(logits_TE, pool_rows_T, tables, router)
        return self.compute(x_TD, weights_TK, slots_TK, slab)

    def route(
        self, logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router
    ) -> tuple[Tensor, Tensor]:
        """Return weights_TK and slots_TK as `compute` takes them."""
        return route_to_slots(logits_TE, pool_rows_T, tables, router)

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D].

        Weights are fp32 and slots int32, all contiguous.
        """
        raise NotImplementedError


class CpuBackend(_PackedOnCpu):
    """emo_kernels.cpu."""

    def __init__(self, experts: CpuExperts) -> None:
        self._experts = experts

    @staticmethod
    def of(activations: torch.dtype) -> CpuBackend | VllmCpuBackend:
        """Return the fastest backend for activations of this dtype on this machine."""
        experts = CpuExperts.of(activations)
        if experts is not None:
            return CpuBackend(experts)
        _LOG.info(
            "experts are computed by vLLM's operation: ours needs float32 or bfloat16, AVX-512"
            " (for bfloat16 with BF16 or AMX), and a C++ compiler (g++, or CXX)"
        )
        return VllmCpuBackend(VllmCpuBackend.fastest(activations))

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        """Write rows of a matrix as the kernel reads them."""
        self._experts.pack_into(out.values, weight.to(out.values.dtype).contiguous())

    def route(
        self, logits_TE: Tensor, pool_rows_T: Tensor, tables: PoolTables, router: Router
    ) -> tuple[Tensor, Tensor]:
        """Return weights_TK and slots_TK as `compute` takes them."""
        routed = self._experts.route(logits_TE, pool_rows_T, tables, router)
        return routed.weights_TK, routed.slots_TK

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D]."""
        return self._experts(x_TD, weights_TK, slots_TK, slab.w13.values, slab.w2.values)


class VllmCpuBackend(_PackedOnCpu):
    """vLLM's grouped GEMM for CPUs (vllm._custom_ops.cpu_fused_moe), in one of its variants.

    "vec" runs on every CPU. "amx" multiplies bfloat16 by AMX's tiles, which the process must have
    asked for (`emo_kernels.cpu.may_use_tiles`).
    """

    def __init__(self, variant: str = "vec") -> None:
        from vllm import _custom_ops

        self._ops, self._variant = _custom_ops, variant

    @staticmethod
    def fastest(activations: torch.dtype) -> str:
        """Return the fastest variant for activations of this dtype on this machine."""
        return "amx" if activations == torch.bfloat16 and may_use_tiles() else "vec"

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        """Write rows of a matrix as the variant reads them."""
        # vLLM's cpu_prepack_moe_weight, but into memory that exists already.
        weight = weight.to(out.values.dtype).contiguous()
        torch.ops._C.prepack_moe_weight(weight[None], out.values[None], self._variant)

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D]."""
        # It computes with every slot that is named: a place of weight 0 names the best one again.
        best_T1 = slots_TK.gather(1, weights_TK.argmax(1, keepdim=True))
        slots_TK = torch.where(weights_TK == 0, best_T1, slots_TK)
        y_TD = torch.empty_like(x_TD)
        w13, w2 = slab.w13.values, slab.w2.values
        self._ops.cpu_fused_moe(
            y_TD, x_TD, w13, w2, None, None, weights_TK, slots_TK, "silu", self._variant
        )
        return y_TD
