"""The batches that the check stage runs every kernel on: one for each thing that can go wrong.

Odd sizes, no token, one token, a hot expert, experts without tokens, pools smaller than top-k, many
and mixed pools, padding, a NaN, slots for some experts only, and each kind of router. Logits lie on
a grid of 1/64, so that ties are exact (and broken by the id) and nothing is nearly a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.kernels.cases import Batch, Geometry
from emo_kernels import Router
from emo_kernels.fp8 import quantize
from emo_kernels.tables import NO_SLOT, PoolTables

__all__ = ["Corner", "corners", "tokens_of"]

_HOT = 20.0  # above every other logit: all tokens take this expert


@dataclass(frozen=True)
class Corner:
    """How to draw one batch; `slots` below num_experts leaves out experts that no pool has."""

    name: str
    geometry: Geometry
    tokens: int
    router: Router
    pools: int = 1
    pool_size: int = 16
    slots: int | None = None
    hot: bool = False
    padding: bool = False
    nan: bool = False
    rows_dtype: torch.dtype = torch.int32
    logits_dtype: torch.dtype | None = None
    temperature: float = 1.0

    def batch(self, dtype: torch.dtype, weights: str, device: torch.device, seed: int) -> Batch:
        """Draw it; `weights` is 16bit (that is, the tokens' dtype) or fp8."""
        random = torch.Generator().manual_seed(seed)
        geometry, tables = self.geometry, self._tables(random)
        num_slots = self.slots or geometry.num_experts
        f, d = geometry.expert_dim, geometry.model_dim
        on_device = torch.Generator(device).manual_seed(seed)

        def slab(rows: int, columns: int) -> Tensor:
            w = torch.empty(num_slots, rows, columns, device=device, dtype=dtype)
            return w.normal_(0, columns**-0.5, generator=on_device)

        w13, w2 = slab(2 * f, d), slab(d, f)
        scales = None
        if weights == "fp8":
            (w13, scales13), (w2, scales2) = _in_fp8(w13), _in_fp8(w2)
            scales = (scales13, scales2)
        x_TD, logits_TE, rows_T = tokens_of(self, dtype, random)
        moved = PoolTables(
            tables.members_PE.to(device),
            tables.temperatures_P.to(device),
            tables.slot_of_expert_E.to(device),
        )
        return Batch(
            x_TD.to(device), logits_TE.to(device), rows_T.to(device), moved, self.router,
            w13, w2, scales,
        )  # fmt: skip

    def _tables(self, random: torch.Generator) -> PoolTables:
        experts, num_slots = self.geometry.num_experts, self.slots or self.geometry.num_experts
        always = set(self.router.always_active) | set(
            range(experts - self.router.num_shared, experts)
        )
        resident = [*always, *(e for e in range(experts) if e not in always)][:num_slots]
        members_PE = torch.zeros(self.pools, experts, dtype=torch.bool)
        for members_E in members_PE:
            others = [expert for expert in resident if expert not in always]
            order = torch.randperm(len(others), generator=random).tolist()
            for place in order[: max(0, self.pool_size - len(always))]:
                members_E[others[place]] = True
        slots_E = torch.full((experts,), NO_SLOT, dtype=torch.int32)
        slots_E[resident] = torch.randperm(num_slots, generator=random).int()
        temperatures_P = torch.full((self.pools,), self.temperature)
        return PoolTables(members_PE, temperatures_P, slots_E)


def _in_fp8(slab: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize slot by slot: many checks run at once, and fp32 copies of slabs are large."""
    pairs = [quantize(w) for w in slab]
    return torch.stack([w for w, _ in pairs]), torch.stack([scales for _, scales in pairs])


def tokens_of(
    corner: Corner, dtype: torch.dtype, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a corner's tokens, logits and pool rows, on the CPU."""
    tokens, experts = corner.tokens, corner.geometry.num_experts
    x_TD = torch.randn(tokens, corner.geometry.model_dim, generator=random).to(dtype)
    logits_TE = torch.randn(tokens, experts, generator=random).mul(64).round() / 64
    rows_T = torch.randint(corner.pools, (tokens,), generator=random).to(corner.rows_dtype)
    if corner.hot:
        logits_TE[:, experts // 2] = _HOT
    if corner.padding:
        rows_T[::3] = -1
        rows_T[tokens - tokens // 4 :] = -1
    if corner.nan:
        logits_TE[tokens // 2] = float("nan")
    return x_TD, logits_TE.to(corner.logits_dtype or dtype), rows_T


def corners(geometry: Geometry, plain: tuple[int, ...], count: int) -> Iterator[Corner]:
    """Yield the corners at a geometry and at odd sizes, of about `count` tokens each.

    `plain` are batch sizes of ordinary use, each a corner of its own.
    """
    experts, router = geometry.num_experts, geometry.router
    base = Corner("plain", geometry, count, router, pool_size=experts // 4)
    for tokens in plain:
        yield replace(base, name=f"{tokens} tokens", tokens=tokens)
    yield replace(base, name="no tokens", tokens=0)
    yield replace(base, name="all experts", pool_size=experts)
    yield replace(base, name="hot expert", hot=True, pool_size=experts)
    yield replace(base, name="pool below top-k", pool_size=max(2, router.top_k - 2))
    yield replace(base, name="4 pools mixed", pools=4)
    yield replace(base, name="256 pools", pools=256, tokens=2 * count, rows_dtype=torch.int64)
    yield replace(base, name="padding", padding=True, pools=2)
    yield replace(base, name="all padding", tokens=1, padding=True)
    yield replace(base, name="NaN logits", nan=True)
    yield replace(base, name="fp32 logits, cold", logits_dtype=torch.float32, temperature=0.5)
    yield replace(base, name="half the slots", slots=experts // 2)
    simple = Router(experts, router.top_k)
    forced = Router(experts, router.top_k, always_active=(1, experts - 2))
    yield replace(base, name="no shared", router=simple)
    yield replace(base, name="renormalized", router=replace(simple, renormalize=True))
    yield replace(base, name="always active", router=forced)
    odd = Geometry(80, 48, 20, 5, 2)
    odd_base = replace(base, geometry=odd, router=odd.router, pools=3)
    for tokens in (1, count):
        yield replace(odd_base, name=f"odd sizes, {tokens} tokens", tokens=tokens)
