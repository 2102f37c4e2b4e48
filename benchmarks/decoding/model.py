"""A whole EMO model with random weights that decodes one token of every sequence per step.

Plain torch except for the experts, which the caller of a step brings: emo_kernels' `pooled_moe` or
its twin. No vLLM, transformers or emo_serve. A step reads and writes tensors that stay in place, so
it can be captured in a CUDA graph; tensors name its pools too, so one graph serves them all.

Attention sees exactly `context` tokens: the cache is a ring, where each step's keys and values
replace the oldest. So every step costs the same, whichever token it is, and no mask is needed.

Weights keep the size of what they multiply (std of fan-in ** -0.5), so that no layer drowns the
others; router logits have a std of 2, so that a token's experts have weights of different sizes.

Shapes: T sequences, one token each; L layers, D hidden size, H heads, C head width, E experts,
S slots (= E here), F expert width, V vocabulary, P pool rows, N the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emo_kernels.tables import PoolTables, Router

__all__ = ["DecodeModel", "Geometry", "Layer", "PooledMoe", "Sequences", "random_pools"]

PooledMoe = Callable[[Tensor, Tensor, Tensor, PoolTables, Router, Tensor, Tensor], Tensor]
"""(x_TD, logits_TE, pool_rows_T, tables, router, w13, w2) -> y_TD"""

Pool = tuple[frozenset[int], ...]
"""The experts of a pool, one set per layer."""

_LOGIT_STD = 2.0


@dataclass(frozen=True)
class Geometry:
    """The sizes of an EMO model; defaults are the released one's."""

    num_layers: int = 16
    hidden_size: int = 2048
    num_heads: int = 16
    num_experts: int = 128
    expert_size: int = 1024
    top_k: int = 8
    num_shared: int = 1
    vocab_size: int = 100352
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def router(self) -> Router:
        """Return the rule every layer's router follows."""
        return Router(self.num_experts, self.top_k, self.num_shared)

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one expert of one layer, and so of one slot."""
        return 3 * self.hidden_size * self.expert_size * dtype.itemsize

    def kv_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Return the bytes of one sequence's keys and values, all layers together."""
        return self.num_layers * context * 2 * self.hidden_size * dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """One layer's weights. Expert e sits in slot tables.slot_of_expert_E[e] of w13 and w2."""

    attention_norm_D: Tensor
    qkv: Tensor  # [3 D, D]: rows of q, then k, then v
    o_proj: Tensor  # [D, D]
    moe_norm_D: Tensor
    gate: Tensor  # [E, D]
    w13: Tensor  # [S, 2 F, D]: gate rows, then up rows
    w2: Tensor  # [S, D, F]
    tables: PoolTables

    @property
    def trunk(self) -> tuple[Tensor, ...]:
        """Return the tensors of the layer that are not experts."""
        return self.attention_norm_D, self.qkv, self.o_proj, self.moe_norm_D, self.gate


@dataclass(frozen=True)
class Sequences:
    """What a batch of sequences holds between steps: tensors that a step changes in place.

    tokens_T int64, the next input of each; pool_rows_T int32; position int64 of one element, how
    many tokens came before (the same for all); cache, one per layer, [T, 2, H, N, C], keys, then
    values.
    """

    tokens_T: Tensor
    pool_rows_T: Tensor
    position: Tensor
    cache: tuple[Tensor, ...]

    @staticmethod
    def random(
        geometry: Geometry,
        num: int,
        context: int,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> Sequences:
        """Return `num` sequences in the base pool, with `context` random earlier tokens each."""
        device = generator.device
        shape = (num, 2, geometry.num_heads, context, geometry.head_dim)
        return Sequences(
            torch.randint(geometry.vocab_size, (num,), generator=generator, device=device),
            torch.zeros(num, dtype=torch.int32, device=device),
            torch.full((1,), context, device=device),
            tuple(
                torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
                for _ in range(geometry.num_layers)
            ),
        )

    def first(self, num: int) -> Sequences:
        """Return the first `num` sequences, as views; the position stays shared."""
        return Sequences(
            self.tokens_T[:num],
            self.pool_rows_T[:num],
            self.position,
            tuple(layer[:num] for layer in self.cache),
        )

    def set_rows(self, rows: Sequence[int]) -> None:
        """Put sequence t in pool row `rows[t % len(rows)]`."""
        wanted = [rows[t % len(rows)] for t in range(len(self.pool_rows_T))]
        self.pool_rows_T.copy_(torch.tensor(wanted, dtype=torch.int32))

    def set_next(self, tokens_T: Tensor, position: Tensor) -> None:
        """Go back to these inputs; a step from there writes the same keys and values again."""
        self.tokens_T.copy_(tokens_T)
        self.position.copy_(position)


class DecodeModel:
    """Random weights, one slot per expert, and the pools in rows 0, 1, ... of its tables."""

    def __init__(
        self,
        geometry: Geometry,
        pools: Sequence[Pool],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.geometry, self.router, self.dtype = geometry, geometry.router, dtype
        self._generator = generator
        width, vocab = geometry.hidden_size, geometry.vocab_size
        self.embed = self._normal(vocab, width, std=1.0)
        self.layers = tuple(
            self._layer([pool[index] for pool in pools]) for index in range(geometry.num_layers)
        )
        self.norm_D = self._norm_weight()
        self.lm_head = self._normal(vocab, width)
        half = torch.arange(0, geometry.head_dim, 2, device=generator.device) / geometry.head_dim
        self.frequencies_C = (geometry.rope_theta**-half).repeat(2)
        self.signs_C = torch.ones_like(self.frequencies_C)
        self.signs_C[: geometry.head_dim // 2] = -1

    @property
    def trunk_bytes(self) -> int:
        """Return the bytes of everything that is not an expert."""
        layers = (tensor for layer in self.layers for tensor in layer.trunk)
        return sum(tensor.nbytes for tensor in (self.embed, self.lm_head, self.norm_D, *layers))

    def step(
        self,
        batch: Sequences,
        pooled_moe: PooledMoe,
        moe_inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Return logits_TV of the batch's tokens; the likeliest ones become its next tokens.

        `moe_inputs` collects the input of each MoE layer, [T, D].
        """
        angles_C = batch.position * self.frequencies_C
        rope = angles_C.cos(), angles_C.sin() * self.signs_C
        x_TD = F.embedding(batch.tokens_T, self.embed)
        for layer, cache in zip(self.layers, batch.cache, strict=True):
            normed_TD = self._norm(x_TD, layer.attention_norm_D)
            x_TD = x_TD + self._attend(normed_TD, layer, cache, batch.position, rope)
            normed_TD = self._norm(x_TD, layer.moe_norm_D)
            if moe_inputs is not None:
                moe_inputs.append(normed_TD)
            x_TD = x_TD + self.moe(normed_TD, layer, batch.pool_rows_T, pooled_moe)
        logits_TV = F.linear(self._norm(x_TD, self.norm_D), self.lm_head)
        batch.tokens_T.copy_(logits_TV.argmax(-1))
        batch.position.add_(1)
        return logits_TV

    def moe(self, x_TD: Tensor, layer: Layer, pool_rows_T: Tensor, pooled_moe: PooledMoe) -> Tensor:
        """Return y_TD of one MoE layer, its gate included."""
        logits_TE = F.linear(x_TD, layer.gate)
        return pooled_moe(
            x_TD, logits_TE, pool_rows_T, layer.tables, self.router, layer.w13, layer.w2
        )

    def _attend(
        self,
        x_TD: Tensor,
        layer: Layer,
        cache: Tensor,
        position: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        geometry, (cos_C, signed_sin_C) = self.geometry, rope
        qkv_T3HC = F.linear(x_TD, layer.qkv).view(-1, 3, geometry.num_heads, geometry.head_dim)
        qk_T2HC = qkv_T3HC[:, :2]
        # fp32 from the product on; roll and signs make [-right, left] without another copy
        turned_T2HC = qk_T2HC.roll(geometry.head_dim // 2, -1) * signed_sin_C
        qk_T2HC.copy_(turned_T2HC.addcmul_(qk_T2HC, cos_C))
        cache.index_copy_(3, position % cache.shape[3], qkv_T3HC[:, 1:].unsqueeze(3))
        y_TH1C = F.scaled_dot_product_attention(
            qkv_T3HC[:, 0].unsqueeze(2), cache[:, 0], cache[:, 1]
        )
        return F.linear(y_TH1C.reshape(x_TD.shape), layer.o_proj)

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        # torch computes it in fp32 whatever the dtype, and rounds once
        return F.rms_norm(x_TD, weight_D.shape, weight_D, self.geometry.rms_norm_eps)

    # -- weights --

    def _layer(self, pools: Sequence[frozenset[int]]) -> Layer:
        geometry = self.geometry
        width, inner, num = geometry.hidden_size, geometry.expert_size, geometry.num_experts
        device = self._generator.device
        members_PE = torch.zeros(len(pools), num, dtype=torch.bool)
        for row, pool in enumerate(pools):
            members_PE[row, sorted(pool)] = True
        slots_E = torch.randperm(num, generator=self._generator, device=device)
        return Layer(
            attention_norm_D=self._norm_weight(),
            qkv=self._normal(3 * width, width),
            o_proj=self._normal(width, width),
            moe_norm_D=self._norm_weight(),
            gate=self._normal(num, width, std=_LOGIT_STD * width**-0.5),
            w13=self._normal(num, 2 * inner, width),
            w2=self._normal(num, width, inner),
            tables=PoolTables(
                members_PE.to(device),
                torch.ones(len(pools), device=device),
                slots_E.to(torch.int32),
            ),
        )

    def _normal(self, *shape: int, std: float | None = None) -> Tensor:
        std = shape[-1] ** -0.5 if std is None else std
        tensor = torch.empty(shape, dtype=self.dtype, device=self._generator.device)
        return tensor.normal_(std=std, generator=self._generator)

    def _norm_weight(self) -> Tensor:
        return 1 + self._normal(self.geometry.hidden_size, std=0.1)


def random_pools(geometry: Geometry, sizes: Sequence[int], seed: int) -> list[Pool]:
    """Return a pool for each size, drawn layer by layer; sizes count the shared experts."""
    generator = torch.Generator().manual_seed(seed)
    standard = geometry.num_experts - geometry.num_shared
    shared = range(standard, geometry.num_experts)

    def draw(size: int) -> frozenset[int]:
        drawn = torch.randperm(standard, generator=generator)[: size - geometry.num_shared]
        return frozenset([*drawn.tolist(), *shared])

    return [tuple(draw(size) for _ in range(geometry.num_layers)) for size in sizes]
