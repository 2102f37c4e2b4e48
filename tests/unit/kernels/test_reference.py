"""The twins against definitions that are not theirs: emo_serve's routing, and plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emo_kernels import reference
from emo_kernels.tables import NO_SLOT, Router
from emo_serve.emo import routing
from emo_serve.facts import MoeLayer
from tests.support.kernel_batches import (
    DEVICE,
    Batch,
    batch_of,
    batches,
    check_schedule,
    chosen_slots,
)

# -- route --


@settings(deadline=None, max_examples=200)
@given(batches())
def test_routes_as_the_model_does(batch: Batch) -> None:
    router, tables = batch.router, batch.tables
    rows_T = batch.pool_rows_T.clamp_min(0).long()
    expected = routing.route(
        batch.logits_TE,
        MoeLayer(router.num_experts, router.num_shared, router.always_active, router.top_k),
        tables.members_PE[rows_T],
        tables.temperatures_P[rows_T, None],
        router.renormalize,
    )
    live_T1 = (batch.pool_rows_T >= 0)[:, None]
    weights_TK = expected.weights_TK.masked_fill(~live_T1, 0.0)
    slots_TK = tables.slot_of_expert_E[expected.experts_TK].masked_fill(weights_TK == 0, NO_SLOT)
    got = reference.route(*batch.args)
    torch.testing.assert_close(got.weights_TK, weights_TK, rtol=1e-6, atol=1e-8)
    assert torch.equal(got.slots_TK, slots_TK)


def test_ties_go_to_the_lower_id() -> None:
    batch = batch_of(Router(64, 5), [set(range(3, 64))], [0, 0])
    batch = batch.with_logits(torch.tensor([0.0, -0.0]).repeat(2, 32))
    slots = reference.route(*batch.args).slots_TK
    assert slots.tolist() == [batch.tables.slot_of_expert_E[3:8].tolist()] * 2


def test_an_expert_that_sits_nowhere_is_not_taken() -> None:
    batch = batch_of(Router(4, 2), [range(4)], [0]).with_logits([[1.0, 2.0, 3.0, 0.0]])
    batch.tables.slot_of_expert_E[2] = NO_SLOT
    routed = reference.route(*batch.args)
    assert routed.slots_TK.tolist() == [[NO_SLOT, int(batch.tables.slot_of_expert_E[1])]]
    weight = torch.tensor([1.0, 2.0, 3.0, 0.0]).softmax(0)[1]
    torch.testing.assert_close(routed.weights_TK.cpu(), torch.tensor([[0.0, weight]]))


# -- dispatch --


@settings(deadline=None, max_examples=100)
@given(chosen_slots(), st.sampled_from([1, 2, 4, 16]))
def test_schedule_is_what_it_promises(case: tuple[Tensor, int], block_m: int) -> None:
    slots_TK, num_slots = case
    check_schedule(reference.dispatch(slots_TK, num_slots, block_m), slots_TK, num_slots)


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [
        ("rows_R", slice(2), torch.tensor([1, 0])),
        ("rows_R", 1, 2),
        ("offsets_S1", 1, 1),
        ("tile_slots", 0, 1),
        ("tile_starts", 0, 1),
        ("num_tiles", 0, 2),
    ],
)
def test_a_wrong_schedule_is_noticed(field: str, index: object, value: object) -> None:
    slots_TK = torch.tensor([[0, 0, NO_SLOT]], dtype=torch.int32)
    schedule = reference.dispatch(slots_TK, 2, 2)
    check_schedule(schedule, slots_TK, 2)
    getattr(schedule, field)[index] = value
    with pytest.raises(AssertionError):
        check_schedule(schedule, slots_TK, 2)


# -- expert maths --


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_the_weighted_sum_of_experts(dtype: torch.dtype, is_fp8: bool) -> None:
    batch = batch_of(Router(6, 3, 1), [range(6), {1}, set()], [0, 1, 2, -1, 0, 0])
    random = torch.Generator().manual_seed(1)
    x_TD, w13, w2 = (
        torch.randn(shape, generator=random).to(DEVICE, dtype)
        for shape in ((6, 16), (6, 64, 16), (6, 16, 32))
    )
    scales = None
    wide13, wide2 = w13.float(), w2.float()
    if is_fp8:
        scales = tuple(
            (torch.rand(shape, generator=random) + 0.5).to(DEVICE) for shape in ((6, 64), (6, 16))
        )
        w13, w2 = w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn)
        wide13, wide2 = w13.float() * scales[0][..., None], w2.float() * scales[1][..., None]
    y_TD = reference.pooled_moe(x_TD, *batch.args, w13, w2, scales)
    routed = reference.route(*batch.args)
    expected_TD = torch.zeros(6, 16, device=DEVICE)
    for token in range(6):
        for slot, weight in zip(routed.slots_TK[token], routed.weights_TK[token], strict=True):
            if slot != NO_SLOT:
                x_D = x_TD[token].float()
                h_F = F.silu(wide13[slot, :32] @ x_D) * (wide13[slot, 32:] @ x_D)
                expected_TD[token] += weight * (wide2[slot] @ h_F)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]  # bf16 keeps 8 bits
    assert y_TD.dtype == dtype
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=tolerance, atol=tolerance * 4)
    assert y_TD[3].count_nonzero() == 0  # the token that has no pool


def test_rows_without_an_expert_add_nothing() -> None:
    rows_RD = torch.tensor([[1.0], [float("nan")], [float("nan")], [float("nan")]])
    slots_TK = torch.tensor([[5, NO_SLOT], [NO_SLOT, NO_SLOT]], dtype=torch.int32)
    assert reference.combine(rows_RD, slots_TK).tolist() == [[1.0], [0.0]]
