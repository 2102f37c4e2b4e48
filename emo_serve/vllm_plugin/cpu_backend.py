"""Expert maths on a CPU: vLLM's grouped GEMM over slots packed for it.

vLLM has a variant for AMX, whose tiles multiply bfloat16, and a portable one ("vec"). Weights are
packed for one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels import PoolTables, Router
from emo_serve.vllm_plugin.packed import PackedMatrix, Slab
from emo_serve.vllm_plugin.slot_routing import route_to_slots

__all__ = ["CpuBackend", "may_use_tiles"]


def may_use_tiles() -> bool:
    """Ask Linux for the tile registers of AMX, once per process; tell whether there are any.

    A process that uses them unasked ends with SIGILL. vLLM's kernels do not ask: they rely on a
    product of oneDNN before them, which does.
    """
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


class CpuBackend:
    """vLLM's grouped GEMM for CPUs (vllm._custom_ops.cpu_fused_moe), in one of its variants."""

    name = "cpu"
    alignment = 32  # vllm 0.32.0, fused_moe/experts/cpu_moe.py: output and reduction alignment
    row_block = alignment
    keeps_layout = False

    def __init__(self, variant: str = "vec") -> None:
        from vllm import _custom_ops

        self._ops, self.variant = _custom_ops, variant

    @classmethod
    def of(cls, activations: torch.dtype) -> CpuBackend:
        """Return the backend with the fastest variant for activations of this dtype here."""
        is_amx = activations == torch.bfloat16 and may_use_tiles()
        return cls("amx" if is_amx else "vec")

    def slab_dtype(self, activations: torch.dtype) -> torch.dtype:
        """Return the activations' dtype."""
        return activations

    def pack_into(self, out: PackedMatrix, weight: Tensor) -> None:
        """Write rows of a matrix as the variant reads them."""
        # vLLM's cpu_prepack_moe_weight, but into memory that exists already.
        weight = weight.to(out.values.dtype).contiguous()
        torch.ops._C.prepack_moe_weight(weight[None], out.values[None], self.variant)

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
        weights_TK, slots_TK = route_to_slots(logits_TE, pool_rows_T, tables, router)
        return self.compute(x_TD, weights_TK, slots_TK, slab)

    def compute(self, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor, slab: Slab) -> Tensor:
        """Return the weighted sum of the experts in these slots, [T, D].

        Weights are fp32 and slots int32, both contiguous.
        """
        y_TD = torch.empty_like(x_TD)
        w13, w2 = slab.w13.values, slab.w2.values
        self._ops.cpu_fused_moe(
            y_TD, x_TD, w13, w2, None, None, weights_TK, slots_TK, "silu", self.variant
        )
        return y_TD
