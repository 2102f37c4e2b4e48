"""PooledExperts: pool-masked routing and expert maths over slots; PooledMoE has the gate, too.

Replaces vLLM's FusedMoE. What differs: a layer holds `num_slots` experts, not all of them, and
each token routes inside the pool its request named. Two tables say how: `slot_of_expert` [E] and
`pool_table` [rows, E], which has one row per pool beside the pool's router temperature. Both may
change in place between steps. The compiler sees one opaque op per layer, so it never specialises
on the tables; a CUDA graph finds them where they were when it was captured.

Shapes: T tokens, D hidden size, F expert width on this rank, E experts, S slots, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.utils.torch_utils import direct_register_custom_op

from emo_kernels import PoolTables, Router
from emo_serve.facts import ModelFacts, MoeLayer
from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.contract import PluginSettings
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert, PackedMatrix, Slab
from emo_serve.vllm_plugin.routing_record import LayerRecord
from emo_serve.vllm_plugin.slot_routing import route_in_pools
from emo_serve.vllm_plugin.streaming import LayerStream, SlotBackend

__all__ = ["PooledExperts", "PooledMoE"]


class PooledExperts(nn.Module):
    """The experts of one MoE layer on this rank, each split by its width, and their tables.

    The gate's logits come from outside, in `logits_dtype`. Behind `num_slots` slots for pools lie
    `num_stream_slots` for experts that pass through (`streaming`).
    """

    slot_of_expert: Tensor
    pool_table: Tensor
    temperatures: Tensor
    w13: Tensor
    w13_scales: Tensor | None
    w2: Tensor
    w2_scales: Tensor | None

    def __init__(
        self,
        facts: ModelFacts,
        moe: MoeLayer,
        settings: PluginSettings,
        backend: MoeBackend,
        prefix: str,
    ) -> None:
        super().__init__()
        self.moe, self.backend, self.prefix = moe, backend, prefix
        self.router = Router(
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            num_shared=moe.num_shared_experts,
            always_active=moe.always_active,
            renormalize=facts.norm_topk_prob,
        )
        self.num_ranks = get_tensor_model_parallel_world_size()
        num_rows = settings.num_pools
        self.num_slots = min(settings.num_slots, moe.num_experts)
        self.num_stream_slots = min(settings.stream_slots, moe.num_experts)
        all_slots = self.num_slots + self.num_stream_slots
        self.stream = (
            LayerStream(moe.num_experts, all_slots, self.num_slots, num_rows)
            if self.num_stream_slots
            else None
        )
        self.logits_dtype = torch.get_default_dtype()
        width = facts.expert_width // self.num_ranks
        dtype = backend.slab_dtype(self.logits_dtype)
        slab = ExpertShape(facts.hidden_size, width, dtype).slab(all_slots)
        buffers = {
            "w13": slab.w13.values,
            "w13_scales": slab.w13.scales,
            "w2": slab.w2.values,
            "w2_scales": slab.w2.scales,
            # Experts without a slot map to slot 0: no published pool lets a token reach them.
            "slot_of_expert": torch.zeros(moe.num_experts, dtype=torch.int32),
            "pool_table": torch.zeros(num_rows, moe.num_experts, dtype=torch.bool),
            "temperatures": torch.ones(num_rows, dtype=torch.float32),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.record: LayerRecord | None = None
        layers = get_current_vllm_config().compilation_config.static_forward_context
        layers[prefix] = self

    def mix(self, x_TD: Tensor, logits_TE: Tensor, pool_rows_T: Tensor) -> Tensor:
        """Return y_TD, summed over the ranks."""
        y_TD = torch.ops.emo_serve.pooled_moe(x_TD, logits_TE, pool_rows_T, self.prefix)
        if self.num_ranks > 1:
            y_TD = tensor_model_parallel_all_reduce(y_TD)
        return y_TD  # type: ignore[no-any-return]

    def compute(self, x_TD: Tensor, logits_TE: Tensor, pool_rows_T: Tensor) -> Tensor:
        """Route, and mix this rank's part of the experts; reads the tables as they are now."""
        if self.record is not None:
            self.record.note(logits_TE)
        tables, stream = self._tables, self.stream
        if stream is not None and stream.has_streamed(pool_rows_T):
            chosen = route_in_pools(logits_TE, pool_rows_T, tables, self.router)
            assert isinstance(self.backend, SlotBackend), "checked by settings.backend_for"
            return stream.mix(x_TD, *chosen, self.slab, self.backend)
        return self.backend(x_TD, logits_TE, pool_rows_T, tables, self.router, self.slab)

    # Buffers never move, and a module looks its own up slowly.

    @cached_property
    def _tables(self) -> PoolTables:
        return PoolTables(self.pool_table, self.temperatures, self.slot_of_expert)

    @cached_property
    def slab(self) -> Slab:
        """Return all slots."""
        return Slab(PackedMatrix(self.w13, self.w13_scales), PackedMatrix(self.w2, self.w2_scales))

    def slot(self, number: int) -> PackedExpert:
        """Return the memory of one slot; write to it only while no published pool uses it."""
        return self.slab.slot(number)

    def map_experts(self, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Map each of these experts to its slot, from the next step on."""
        device = self.slot_of_expert.device
        where = torch.tensor(slots, dtype=torch.int32, device=device)
        self.slot_of_expert[torch.tensor(experts, device=device)] = where
        if self.stream is not None:
            self.stream.note(experts, slots)

    def publish(
        self, row: int, experts: Sequence[int], temperature: float, *, is_streamed: bool = False
    ) -> None:
        """Let tokens of `row` route among `experts`; unless streamed, all must be in their slots.

        A layer without stream slots streams nothing.
        """
        assert self.stream is not None or not is_streamed
        if self.stream is not None:
            self.stream.set_row(row, is_streamed=is_streamed)
        mask_E = torch.zeros_like(self.pool_table[row])
        mask_E[list(experts)] = True
        self.pool_table[row].copy_(mask_E)
        self.temperatures[row] = temperature

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of one slot on this rank."""
        return self.slot(0).num_bytes

    @property
    def slab_bytes(self) -> int:
        """Return the bytes of all slots on this rank."""
        return self.slot_bytes * (self.num_slots + self.num_stream_slots)


class PooledMoE(PooledExperts):
    """One MoE layer of EMO on this rank: the gate is replicated."""

    def __init__(
        self,
        facts: ModelFacts,
        moe: MoeLayer,
        settings: PluginSettings,
        backend: MoeBackend,
        prefix: str,
    ) -> None:
        super().__init__(facts, moe, settings, backend, prefix)
        self.gate = ReplicatedLinear(
            facts.hidden_size, moe.num_experts, bias=False, prefix=f"{prefix}.gate"
        )

    def forward(self, x_TD: Tensor, pool_rows_T: Tensor) -> Tensor:
        """Return y_TD, summed over the ranks."""
        logits_TE, _ = self.gate(x_TD)
        return self.mix(x_TD, logits_TE, pool_rows_T)


# -- the op the compiler sees --


def _pooled_moe(x: Tensor, logits: Tensor, pool_rows: Tensor, layer_name: str) -> Tensor:
    layer: PooledExperts = get_forward_context().no_compile_layers[layer_name]
    return layer.compute(x, logits, pool_rows)


def _pooled_moe_fake(x: Tensor, logits: Tensor, pool_rows: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


_LIBRARY = Library("emo_serve", "FRAGMENT")
direct_register_custom_op(
    "pooled_moe", _pooled_moe, fake_impl=_pooled_moe_fake, target_lib=_LIBRARY
)
