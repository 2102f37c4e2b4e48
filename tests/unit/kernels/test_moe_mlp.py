"""The whole layer under the interpreter: against its twin, and what a server relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emo_kernels import (
    NO_SLOT,
    Config,
    PoolTables,
    Router,
    Tile,
    combine,
    pooled_moe,
    quantize,
    reference,
)
from tests.support.kernel_batches import DEVICE
from tests.support.kernel_tolerance import TOLERANCE

D, F = 48, 32


class Layer:
    """A random layer whose slab holds every expert, in another order than their ids."""

    def __init__(self, router: Router, pools: list[set[int]], seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        e = router.num_experts
        self.router = router
        self.tables = PoolTables(
            torch.tensor([[expert in pool for expert in range(e)] for pool in pools]).to(DEVICE),
            torch.linspace(0.5, 1.5, len(pools), device=DEVICE),
            torch.randperm(e, generator=self.random).int().to(DEVICE),
        )
        self.w13 = self.normal(e, 2 * F, D) / D**0.5
        self.w2 = self.normal(e, D, F) / F**0.5

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(DEVICE)

    def tokens(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_TD, logits_TE and pool_rows_T for tokens of these pool rows."""
        t = len(rows)
        logits_TE = self.normal(t, self.router.num_experts)
        return self.normal(t, D), logits_TE, torch.tensor(rows, dtype=torch.int64, device=DEVICE)

    def weights(self) -> tuple[PoolTables, Router, Tensor, Tensor]:
        return self.tables, self.router, self.w13, self.w2


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, list[int]]:
    num_experts = draw(st.integers(1, 12))
    num_shared = draw(st.integers(0, min(2, num_experts)))
    ids = st.integers(0, num_experts - 1)
    always = tuple(sorted(draw(st.sets(ids, max_size=2)))) if draw(st.booleans()) else ()
    forced = len(always) or num_shared
    router = Router(
        num_experts,
        draw(st.integers(max(1, forced), num_experts)),
        num_shared,
        always,
        renormalize=not forced and draw(st.booleans()),
    )
    pools = draw(st.lists(st.sets(ids), min_size=1, max_size=4))
    rows = draw(st.lists(st.integers(-1, len(pools) - 1), max_size=20))
    return Layer(router, pools, draw(st.integers(0, 2**16))), rows


@settings(deadline=None, max_examples=40)
@given(layers(), st.booleans())
def test_equals_the_twin(case: tuple[Layer, list[int]], is_fp8: bool) -> None:
    layer, rows = case
    args, weights = layer.tokens(rows), layer.weights()
    scales = None
    if is_fp8:
        (w13, scales_13), (w2, scales_2) = quantize(layer.w13), quantize(layer.w2)
        weights, scales = (layer.tables, layer.router, w13, w2), (scales_13, scales_2)
    y_TD = pooled_moe(*args, *weights, scales)
    expected_TD = reference.pooled_moe(*args, *weights, scales)
    torch.testing.assert_close(y_TD, expected_TD, **TOLERANCE[torch.float32])


def test_half_precision() -> None:
    layer = Layer(Router(8, 3, 1), [set(range(8)), {1, 2}])
    x_TD, logits_TE, rows_T = layer.tokens([0, 1, -1, 1, 0])
    args = (x_TD.half(), logits_TE.half(), rows_T, layer.tables, layer.router)
    y_TD = pooled_moe(*args, layer.w13.half(), layer.w2.half())
    expected_TD = reference.pooled_moe(*args, layer.w13.half(), layer.w2.half())
    assert y_TD.dtype == torch.float16
    torch.testing.assert_close(y_TD, expected_TD, **TOLERANCE[torch.float16])


def test_padding_costs_nothing_and_gives_zero() -> None:
    """Padded tokens hold whatever a graph left in them: nan goes neither in nor out."""
    layer = Layer(Router(8, 3, 1), [set(range(8))])
    x_TD, logits_TE, rows_T = layer.tokens([0, -1, 0, -1])
    x_TD[[1, 3]] = float("nan")
    logits_TE[[1, 3]] = float("nan")
    y_TD = pooled_moe(x_TD, logits_TE, rows_T, *layer.weights())
    kept = pooled_moe(x_TD[[0, 2]], logits_TE[[0, 2]], rows_T[[0, 2]], *layer.weights())
    assert (y_TD[[1, 3]] == 0).all()
    torch.testing.assert_close(y_TD[[0, 2]], kept, **TOLERANCE[torch.float32])


def test_tokens_route_as_if_their_pool_were_alone() -> None:
    """A mixed batch gives each token what a batch of its own pool gives it."""
    pools = [{0, 1, 2}, {3, 4, 5, 6}, {2, 3}, set(range(9))]
    layer = Layer(Router(10, 4, 1), pools)
    x_TD, logits_TE, rows_T = layer.tokens([t % 4 for t in range(24)])
    y_TD = pooled_moe(x_TD, logits_TE, rows_T, *layer.weights())
    for row in range(4):
        mine = rows_T == row
        alone = pooled_moe(x_TD[mine], logits_TE[mine], rows_T[mine], *layer.weights())
        torch.testing.assert_close(y_TD[mine], alone, **TOLERANCE[torch.float32])


def test_slots_outside_the_pools_are_never_read() -> None:
    layer = Layer(Router(8, 3, 1), [{0, 1, 2}, {2, 3}])
    for expert in (4, 5, 6):
        slot = layer.tables.slot_of_expert_E[expert]
        layer.w13[slot] = layer.w2[slot] = float("nan")
    y_TD = pooled_moe(*layer.tokens([0, 1] * 8), *layer.weights())
    assert not y_TD.isnan().any()


def test_a_given_config_changes_no_value_beyond_rounding() -> None:
    layer = Layer(Router(8, 3, 1), [set(range(8))])
    args = layer.tokens([0] * 20)
    y_TD = pooled_moe(*args, *layer.weights())
    tile = Tile(16, 16, 4, 2, programs_per_sm=1)
    other_TD = pooled_moe(*args, *layer.weights(), config=Config(32, tile, tile))
    torch.testing.assert_close(y_TD, other_TD, **TOLERANCE[torch.float32])


def test_combine_sums_in_order_and_reads_taken_rows_alone() -> None:
    slots = [[0, NO_SLOT, 3], [NO_SLOT, NO_SLOT, NO_SLOT]]
    slots_TK = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    rows_RD = torch.arange(6.0, device=DEVICE)[:, None].repeat(1, 1000)
    rows_RD[[1, 3, 4, 5]] = float("nan")
    y_TD = combine(rows_RD, slots_TK)
    assert torch.equal(y_TD.cpu(), torch.tensor([[2.0], [0.0]]).expand(2, 1000))
    assert torch.equal(y_TD, reference.combine(rows_RD, slots_TK))
    assert combine(rows_RD[:0], slots_TK[:0]).shape == (0, 1000)
    with pytest.raises(ValueError, match="want 6 contiguous rows"):
        combine(rows_RD[:5], slots_TK)
