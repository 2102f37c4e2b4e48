"""What the kernels are measured on: a geometry, slabs of weights, pools and batches of tokens.

Shapes: T tokens, D model dim, F expert dim, E experts, P pool rows, S slots, K places per token,
L layers that a rotation visits. Weights and tokens are random; logits are standard normal, so that
a pool's experts are chosen about equally often. Slabs hold every expert (S = E) in slots of a
random order, with a pool's experts scattered over them; only those that tokens chose should cost
anything.

Bytes of a call, with R places taken, `hit` distinct slots and b bytes per token element:

    weights  hit * (3 * D * F * weight bytes + 4 * (2 * F + D) where weights have scales)
    the rest T * E * b (logits) + T * D * b (x) + 2 * R * F * b (h, written and read)
             + 2 * R * D * b (rows, written and read) + T * D * b (y)

h and rows may stay in L2, so the weights' bytes are also given alone. FLOPs: 6 * R * D * F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from emo_kernels.fp8 import quantize
from emo_kernels.tables import PoolTables, Router

__all__ = ["DTYPES", "Batch", "Case", "Geometry", "RELEASED", "SMOKE", "Slabs", "Work", "rotation"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes of tokens, and of weights that have no scales."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a MoE layer."""

    model_dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    num_shared: int

    @property
    def router(self) -> Router:
        """Return the rule of this layer's router."""
        return Router(self.num_experts, self.top_k, self.num_shared)


RELEASED = Geometry(2048, 1024, 128, 8, 1)
SMOKE = Geometry(64, 32, 16, 4, 1)


@dataclass(frozen=True)
class Case:
    """One shape to measure: `pools` pools of `pool_size` experts, tokens of all of them mixed.

    `weights` is 16bit (the tokens' dtype) or fp8.
    """

    tokens: int
    pools: int
    pool_size: int
    weights: str

    @property
    def pool(self) -> str:
        """Return how tables and plots name the pools: 16, or 4x16."""
        return f"{self.pools}x{self.pool_size}" if self.pools > 1 else str(self.pool_size)


@dataclass(frozen=True)
class Slabs:
    """The weights of L layers: w13_LSFD [L, S, 2F, D], w2_LSDF; scales only where they are fp8."""

    w13_LSFD: Tensor
    w2_LSDF: Tensor
    scales13_LSF: Tensor | None
    scales2_LSD: Tensor | None

    @classmethod
    def random(
        cls,
        geometry: Geometry,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> Slabs:
        """Fill slabs with normal values that keep a layer's output on the order of its input."""
        random = torch.Generator(device).manual_seed(seed)
        dims, experts = (geometry.model_dim, geometry.expert_dim), geometry.num_experts

        def normal(rows: int, columns: int) -> Tensor:
            w = torch.empty(layers, experts, rows, columns, device=device, dtype=dtype)
            return w.normal_(0, columns**-0.5, generator=random)

        return cls(normal(2 * dims[1], dims[0]), normal(dims[0], dims[1]), None, None)

    def in_fp8(self) -> Slabs:
        """Return the same weights in e4m3 with one scale per output channel."""
        w13 = [quantize(w) for w in self.w13_LSFD]
        w2 = [quantize(w) for w in self.w2_LSDF]
        return Slabs(
            torch.stack([w for w, _ in w13]),
            torch.stack([w for w, _ in w2]),
            torch.stack([scales for _, scales in w13]),
            torch.stack([scales for _, scales in w2]),
        )

    @property
    def layers(self) -> int:
        """Return L."""
        return self.w13_LSFD.shape[0]


@dataclass(frozen=True)
class Batch:
    """The arguments of one call: tokens, pools and one layer's weights."""

    x_TD: Tensor
    logits_TE: Tensor
    pool_rows_T: Tensor
    tables: PoolTables
    router: Router
    w13: Tensor
    w2: Tensor
    scales: tuple[Tensor, Tensor] | None

    @property
    def slots(self) -> int:
        """Return how many slots the batch's pools hold together, as a tuning table counts them."""
        return int(self.tables.members_PE.any(0).sum())


@dataclass(frozen=True)
class Work:
    """What one call has to move and to compute; the formulas are in this module's docstring."""

    hit: int
    rows: int
    weight_bytes: int
    bytes: int
    flops: int

    @classmethod
    def of(cls, batch: Batch, slots_TK: Tensor) -> Work:
        """Count a batch's work from the slots its tokens chose."""
        chosen = slots_TK[slots_TK >= 0]
        hit, rows = int(chosen.unique().numel()), int(chosen.numel())
        (tokens, model_dim), expert_dim = batch.x_TD.shape, batch.w2.shape[2]
        expert_bytes = 3 * model_dim * expert_dim * batch.w2.element_size()
        if batch.scales is not None:
            expert_bytes += 4 * (2 * expert_dim + model_dim)
        element = batch.x_TD.element_size()
        once = tokens * (batch.logits_TE.shape[1] + 2 * model_dim)
        twice = rows * (expert_dim + model_dim)
        return cls(
            hit=hit,
            rows=rows,
            weight_bytes=hit * expert_bytes,
            bytes=hit * expert_bytes + element * (once + 2 * twice),
            flops=6 * rows * model_dim * expert_dim,
        )


def pool_tables(
    geometry: Geometry, pools: int, pool_size: int, seed: int, device: torch.device
) -> PoolTables:
    """Draw random pools with the shared experts in each, and a random order of the slots."""
    random = torch.Generator().manual_seed(seed)
    standard = geometry.num_experts - geometry.num_shared
    members_PE = torch.zeros(pools, geometry.num_experts, dtype=torch.bool)
    members_PE[:, standard:] = True
    for members_E in members_PE:
        chosen = torch.randperm(standard, generator=random)[: pool_size - geometry.num_shared]
        members_E[chosen] = True
    slots_E = torch.randperm(geometry.num_experts, generator=random).int()
    return PoolTables(members_PE.to(device), torch.ones(pools, device=device), slots_E.to(device))


def rotation(
    case: Case,
    geometry: Geometry,
    slabs: Slabs,
    calls: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """Yield `calls` batches of a case: new tokens and pools each, the layers taking turns."""
    random = torch.Generator(device).manual_seed(case.tokens)
    for call in range(calls):
        layer = call % slabs.layers

        def normal(columns: int) -> Tensor:
            shape = (case.tokens, columns)
            return torch.randn(shape, generator=random, device=device).to(dtype)

        scales = None
        if slabs.scales13_LSF is not None and slabs.scales2_LSD is not None:
            scales = (slabs.scales13_LSF[layer], slabs.scales2_LSD[layer])
        yield Batch(
            x_TD=normal(geometry.model_dim),
            logits_TE=normal(geometry.num_experts),
            pool_rows_T=torch.arange(case.tokens, device=device).int() % case.pools,
            tables=pool_tables(geometry, case.pools, case.pool_size, 1000 + call, device),
            router=geometry.router,
            w13=slabs.w13_LSFD[layer],
            w2=slabs.w2_LSDF[layer],
            scales=scales,
        )
