"""The routing kernels against their twin: every rule, any pool, and the corners where they end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_kernels import reference
from emo_kernels.cpu import CpuExperts
from emo_kernels.routing import route
from emo_kernels.tables import NO_SLOT, Routed, Router
from tests.support.kernel_batches import DEVICE, Batch, assert_same_routing, batch_of, batches

NAN = float("nan")
RELEASED = Router(num_experts=128, top_k=8, num_shared=1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def routed_as_twin(batch: Batch) -> Routed:
    """Return what Triton's kernel and, where it runs, that for CPUs find."""
    expected = reference.route(*batch.args)
    got = route(*batch.args)
    assert_same_routing(got, expected)
    on_cpu = CpuExperts.of(batch.logits_TE.dtype) if DEVICE == "cpu" else None
    if on_cpu is not None:
        assert_same_routing(on_cpu.route(*batch.args), expected)
    return got


@settings(deadline=None, max_examples=60)
@given(batches(), st.booleans())
def test_equals_the_twin(batch: Batch, has_ties: bool) -> None:
    routed_as_twin(replace(batch, logits_TE=batch.logits_TE.round()) if has_ties else batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "router",
    [
        RELEASED,
        Router(100, 7, 2),
        Router(128, 8, always_active=(5, 99), num_shared=1),
        Router(64, 8, renormalize=True),
        Router(1024, 4, 1),
        Router(1, 1),
        Router(3, 3, 3),
    ],
    ids=str,
)
def test_rules_and_dtypes(router: Router, dtype: torch.dtype) -> None:
    half = range(0, router.num_experts, 2)
    rows = [0, 1, -1, 1]
    batch = batch_of(router, [range(router.num_experts), half], rows, dtype=dtype)
    routed = routed_as_twin(batch)
    assert routed.weights_TK.dtype == torch.float32
    assert routed.slots_TK[0].min() >= 0


def test_no_tokens() -> None:
    routed = route(*batch_of(RELEASED, [range(128)], []).args)
    assert routed.weights_TK.shape == routed.slots_TK.shape == (0, 8)


def test_one_token() -> None:
    routed = routed_as_twin(batch_of(RELEASED, [range(128)], [0]))
    assert (routed.slots_TK >= 0).all()
    assert routed.weights_TK[0, -1] == 1.0  # the one shared expert


def test_pools_smaller_than_top_k() -> None:
    batch = batch_of(RELEASED, [set(), {4}, {4, 9, 127}], [0, 1, 2])
    routed = routed_as_twin(batch)
    assert (routed.slots_TK >= 0).sum(-1).tolist() == [1, 2, 3]
    assert (routed.weights_TK[routed.slots_TK == NO_SLOT] == 0).all()


def test_a_pool_of_one_expert_has_weight_one() -> None:
    routed = routed_as_twin(batch_of(Router(8, 2, renormalize=True), [{3}], [0]))
    assert routed.weights_TK.tolist() == [[1.0, 0.0]]


def test_mixed_pools_keep_to_their_own() -> None:
    pools = [range(40), range(40, 90), range(90, 127)]
    batch = batch_of(RELEASED, pools, [0, 1, 2, 1, 0, 2])
    routed = routed_as_twin(batch)
    expert_of_slot = batch.tables.slot_of_expert_E.argsort()
    for row, slots_K in zip(batch.pool_rows_T.tolist(), routed.slots_TK, strict=True):
        assert set(expert_of_slot[slots_K].tolist()) <= {*pools[row], 127}


def test_256_pools_in_one_batch() -> None:
    pools = [{first % 32, (first * 7 + 3) % 32} for first in range(256)]
    rows = [255, 0, 128, 254, 1, 77, 200]
    temperatures = [1.0 + index / 64 for index in range(256)]
    routed_as_twin(batch_of(Router(32, 4, 1), pools, rows, temperatures=temperatures))


def test_padding_takes_nothing_whatever_its_logits() -> None:
    batch = batch_of(Router(8, 4, 2), [range(8)], [-1, 0, -1])
    batch.logits_TE[0] = NAN
    routed = routed_as_twin(batch)
    for token in (0, 2):
        assert routed.slots_TK[token].tolist() == [NO_SLOT] * 4
        assert routed.weights_TK[token].tolist() == [0.0] * 4


@pytest.mark.parametrize("router", [Router(8, 4), Router(8, 4, 0, (1, 6)), Router(8, 4, 1)])
@pytest.mark.parametrize("bad", [(2,), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_nan_logits_give_nan_weights_and_real_slots(router: Router, bad: tuple[int, ...]) -> None:
    batch = batch_of(router, [range(8), {0, 2, 7}, {0, 7}], [0, 1, 2, 0])
    batch.logits_TE[:3, list(bad)] = NAN
    routed = routed_as_twin(batch)
    first = routed.slots_TK[:2, len(router.always_active)]
    assert (first == batch.tables.slot_of_expert_E[bad[0]]).all()  # nan comes first
    assert routed.weights_TK[:2, 0].isnan().all()
    assert routed.slots_TK.max() < 8
    assert not routed.weights_TK[3].isnan().any()
    if bad == (2,):
        assert not routed.weights_TK[2].isnan().any()  # its pool lacks the bad expert


def test_ties_go_to_the_lower_id() -> None:
    batch = batch_of(Router(64, 5), [set(range(3, 64))], [0, 0])
    batch = batch.with_logits(torch.tensor([0.0, -0.0]).repeat(2, 32))
    expected = batch.tables.slot_of_expert_E[3:8].tolist()
    assert routed_as_twin(batch).slots_TK.tolist() == [expected] * 2


def test_a_weight_of_zero_takes_no_expert() -> None:
    batch = batch_of(Router(4, 3), [range(4)], [0, 0])
    logits = [[0.0, -1000.0, 1.0, -2000.0], [float("-inf"), 1.0, float("-inf"), float("-inf")]]
    routed = routed_as_twin(batch.with_logits(logits))
    assert (routed.slots_TK >= 0).sum(-1).tolist() == [2, 1]


def test_an_expert_that_sits_nowhere_is_not_taken() -> None:
    batch = batch_of(Router(16, 4), [range(16)], [0, 0, 0])
    batch.tables.slot_of_expert_E[::2] = NO_SLOT
    routed = routed_as_twin(batch)
    assert (routed.slots_TK == NO_SLOT).any()


def test_always_active_experts_come_first() -> None:
    batch = batch_of(Router(16, 4, 1, (9, 2)), [{0, 1, 3}], [0, 0])
    routed = routed_as_twin(batch)
    expected = batch.tables.slot_of_expert_E[torch.tensor([9, 2], device=DEVICE)]
    assert torch.equal(routed.slots_TK[:, :2], expected.expand(2, 2))


def test_logits_may_lie_apart_and_pool_rows_be_int64() -> None:
    batch = batch_of(Router(20, 4, 1), [range(20), range(5)], [1, 0, -1])
    wide_TE = torch.full((3, 50), NAN, device=DEVICE)
    wide_TE[:, :20] = batch.logits_TE
    wide = replace(batch, logits_TE=wide_TE[:, :20], pool_rows_T=batch.pool_rows_T.long())
    assert not wide.logits_TE.is_contiguous()
    assert_same_routing(routed_as_twin(wide), routed_as_twin(batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype: torch.dtype) -> None:
    rows = [token % 3 - 1 for token in range(200)]
    routed_as_twin(batch_of(RELEASED, [range(128), range(3, 90, 2)], rows, dtype=dtype))


def test_what_does_not_fit_is_refused() -> None:
    batch = batch_of(Router(8, 2), [range(8)], [0, 0])
    tables = batch.tables
    with pytest.raises(ValueError, match=r"logits_TE is torch.float64"):
        route(batch.logits_TE.double(), *batch.args[1:])
    with pytest.raises(ValueError, match=r"strides \(1, 2\); the last must be 1"):
        route(batch.logits_TE.t().contiguous().t(), *batch.args[1:])
    with pytest.raises(ValueError, match=r"logits_TE .* shape \(2, 7\)"):
        route(batch.logits_TE[:, :7], *batch.args[1:])
    with pytest.raises(ValueError, match=r"pool_rows_T .* wanted .* shape \(2,\)"):
        route(batch.logits_TE, batch.pool_rows_T[:1], tables, batch.router)
    with pytest.raises(ValueError, match="members_PE is torch.int32"):
        wrong = replace(tables, members_PE=tables.members_PE.int())
        route(batch.logits_TE, batch.pool_rows_T, wrong, batch.router)
    with pytest.raises(ValueError, match="members_PE has no row"):
        empty = replace(tables, members_PE=tables.members_PE[:0])
        route(batch.logits_TE, batch.pool_rows_T, empty, batch.router)
