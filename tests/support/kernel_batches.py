"""Layers, pools and batches to route, and what every schedule must satisfy.

On a machine with a GPU the kernels are compiled and run there; elsewhere they are interpreted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from emo_kernels.tables import NO_SLOT, PoolTables, Routed, Router, Schedule

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Batch:
    """Tokens to route: a layer's rule, its tables, gate logits and each token's pool row."""

    router: Router
    tables: PoolTables
    logits_TE: Tensor
    pool_rows_T: Tensor

    @property
    def args(self) -> tuple[Tensor, Tensor, PoolTables, Router]:
        """Return what `route` takes."""
        return self.logits_TE, self.pool_rows_T, self.tables, self.router

    def with_logits(self, logits: object) -> Batch:
        """Return the batch with other logits, given as nested lists or a tensor."""
        logits_TE = torch.as_tensor(logits, dtype=torch.float32, device=DEVICE)
        return replace(self, logits_TE=logits_TE)


def batch_of(
    router: Router,
    pools: Sequence[set[int] | range],
    rows: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    temperatures: Sequence[float] | None = None,
    seed: int = 0,
) -> Batch:
    """Return random logits for tokens of these pool rows; the slots are a shuffle of the ids."""
    random = torch.Generator().manual_seed(seed)
    ids = range(router.num_experts)
    members_PE = torch.tensor([[expert in pool for expert in ids] for pool in pools])
    tables = PoolTables(
        members_PE.to(DEVICE),
        torch.tensor(temperatures or [1.0] * len(pools), device=DEVICE),
        torch.randperm(len(ids), generator=random).int().to(DEVICE),
    )
    logits_TE = torch.randn(len(rows), len(ids), generator=random).to(DEVICE, dtype)
    return Batch(router, tables, logits_TE, torch.tensor(rows, dtype=torch.int32, device=DEVICE))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw any rule, pools of any size down to none, and tokens of them or of no pool."""
    num_experts = draw(st.integers(1, 40))
    ids = st.integers(0, num_experts - 1)
    num_shared = 0
    always: tuple[int, ...] = ()
    renormalize = draw(st.booleans())
    if not renormalize:
        num_shared = draw(st.integers(0, min(3, num_experts)))
        always = tuple(sorted(draw(st.sets(ids, max_size=3))))
    forced = len(always) or num_shared
    top_k = draw(st.integers(max(1, forced), min(num_experts, 9)))
    router = Router(num_experts, top_k, num_shared, always, renormalize)
    pools = draw(st.lists(st.sets(ids), min_size=1, max_size=4))
    return batch_of(
        router,
        pools,
        draw(st.lists(st.integers(-1, len(pools) - 1), max_size=6)),
        temperatures=[draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in pools],
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def chosen_slots(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw slots_TK, among them hot slots, unused ones and places without any; and S."""
    num_slots = draw(st.integers(1, 20))
    top_k = draw(st.integers(1, 5))
    used = draw(st.lists(st.integers(NO_SLOT, num_slots - 1), min_size=1, max_size=6))
    places = st.lists(st.sampled_from(used), min_size=top_k, max_size=top_k)
    slots = draw(st.lists(places, max_size=40))
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE).view(-1, top_k), num_slots


def check_schedule(schedule: Schedule, slots_TK: Tensor, num_slots: int) -> None:
    """Assert all that a schedule promises, from its definition and not from the twin."""
    slots = slots_TK.flatten().tolist()
    taken = [row for row, slot in enumerate(slots) if slot != NO_SLOT]
    counts = Counter(slots[row] for row in taken)
    offsets = schedule.offsets_S1.tolist()
    assert len(offsets) == num_slots + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(taken)
    steps = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    assert steps == [counts[slot] for slot in range(num_slots)]
    rows = schedule.rows_R.tolist()[: len(taken)]
    assert sorted(rows) == taken
    assert rows == sorted(taken, key=lambda row: (slots[row], row))
    tiles = [
        (slot, begin)
        for slot in range(num_slots)
        for begin in range(offsets[slot], offsets[slot + 1], schedule.block_m)
    ]
    assert schedule.num_tiles.tolist() == [len(tiles)]
    assert len(tiles) <= schedule.tile_slots.shape[0] == schedule.tile_starts.shape[0]
    pairs = zip(schedule.tile_slots.tolist(), schedule.tile_starts.tolist(), strict=True)
    assert list(pairs)[: len(tiles)] == tiles


def assert_same_routing(got: Routed, expected: Routed) -> None:
    """Assert equal slots, and weights that differ by an exponential's rounding at most."""
    assert got.slots_TK.dtype == torch.int32
    assert torch.equal(got.slots_TK, expected.slots_TK)
    torch.testing.assert_close(
        got.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-7, equal_nan=True
    )
