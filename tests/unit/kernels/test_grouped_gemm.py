"""The grouped GEMMs under the interpreter against their twins, over shapes, tiles and dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emo_kernels import reference
from emo_kernels.fp8 import quantize
from emo_kernels.grouped_gemm import down, gate_up
from emo_kernels.tables import NO_SLOT, Schedule
from emo_kernels.tuning import Tile
from tests.support.kernel_batches import DEVICE
from tests.support.kernel_tolerance import TOLERANCE

PLAIN = Tile(block_n=32, block_k=32, num_warps=4, num_stages=2)
TILES = (
    PLAIN,
    replace(PLAIN, block_n=64, block_k=64, group_m=4),  # wider than some matrices
    replace(PLAIN, block_k=16, group_m=2, programs_per_sm=1),  # takes several tiles in turn
    replace(PLAIN, use_tma=True),
    replace(PLAIN, block_k=64, use_tma=True, programs_per_sm=1, group_m=8),
)


class Case:
    """Tokens, slabs and a schedule of one layer."""

    def __init__(
        self,
        slots_TK: list[list[int]],
        num_slots: int,
        d: int,
        f: int,
        *,
        dtype: torch.dtype = torch.float32,
        is_fp8: bool = False,
        block_m: int = 16,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(DEVICE)

        slots = torch.tensor(slots_TK, dtype=torch.int32, device=DEVICE)
        self.slots_TK = slots.view(len(slots_TK), -1)
        num_tokens, self.top_k = self.slots_TK.shape
        self.x_TD = normal(num_tokens, d).to(dtype)
        self.weights_TK = torch.rand(num_tokens, self.top_k, generator=random).to(DEVICE)
        w13, w2 = normal(num_slots, 2 * f, d) / d**0.5, normal(num_slots, d, f) / f**0.5
        self.scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if is_fp8:
            (self.w13, scales_13), (self.w2, scales_2) = quantize(w13), quantize(w2)
            self.scales = scales_13, scales_2
        else:
            self.w13, self.w2 = w13.to(dtype), w2.to(dtype)
        self.schedule = reference.dispatch(self.slots_TK, num_slots, block_m)

    def check(self, tile: Tile, schedule: Schedule | None = None) -> None:
        """Compare both GEMMs with the twins where a row took an expert."""
        schedule = schedule or self.schedule
        tolerance = TOLERANCE[self.x_TD.dtype]
        num_rows = int(self.schedule.offsets_S1[-1])
        args = (schedule, self.top_k, self.scales[0])
        h_RF = gate_up(self.x_TD, self.w13, *args, tile=tile)
        expected_h_RF = reference.gate_up(self.x_TD, self.w13, *args)
        torch.testing.assert_close(h_RF[:num_rows], expected_h_RF[:num_rows], **tolerance)
        # What lies past the rows must not matter: a kernel may read it, never use it.
        poisoned_RF = expected_h_RF.clone()
        poisoned_RF[num_rows:] = float("nan")
        down_args = (self.w2, self.weights_TK, schedule, self.scales[1])
        rows_RD = down(poisoned_RF, *down_args, tile=tile)
        expected_RD = reference.down(expected_h_RF, *down_args)
        taken_R = self.slots_TK.flatten() != NO_SLOT
        torch.testing.assert_close(rows_RD[taken_R], expected_RD[taken_R], **tolerance)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_slots = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, 4))
    slots = st.integers(NO_SLOT, num_slots - 1)
    slots_TK = draw(
        st.lists(st.lists(slots, min_size=top_k, max_size=top_k), min_size=1, max_size=24)
    )
    sizes = st.sampled_from([16, 32, 48, 80, 112])
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return Case(
        slots_TK,
        num_slots,
        draw(sizes),
        draw(sizes),
        dtype=dtype,
        is_fp8=draw(st.booleans()),
        block_m=draw(st.sampled_from([16, 32])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(deadline=None, max_examples=30)
@given(cases(), st.sampled_from(TILES))
def test_equals_the_twins(case: Case, tile: Tile) -> None:
    case.check(tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "slots_TK",
    [
        pytest.param([[0]], id="one token"),
        pytest.param([[2, 0]] * 40, id="hot experts and empty ones"),
        pytest.param([[NO_SLOT, 3]] + [[3, NO_SLOT]] * 16, id="one tile and one row more"),
        pytest.param([[t % 4, NO_SLOT] for t in range(4)], id="a row an expert"),
    ],
)
def test_corners(slots_TK: list[list[int]], tile: Tile) -> None:
    Case(slots_TK, 4, 48, 80).check(tile)
    Case(slots_TK, 4, 64, 32, is_fp8=True, dtype=torch.float16).check(tile)


def test_no_work_without_rows() -> None:
    case = Case([[NO_SLOT, NO_SLOT]] * 3, 4, 32, 16)
    h_RF = gate_up(case.x_TD, case.w13, case.schedule, 2, tile=PLAIN)
    assert h_RF.shape == (6, 16)
    empty = reference.dispatch(case.slots_TK[:0], 4, 16)
    assert gate_up(case.x_TD[:0], case.w13, empty, 2).shape == (0, 16)
    assert down(h_RF[:0], case.w2, case.weights_TK[:0], empty).shape == (0, 32)


def test_only_the_slots_hit_are_read() -> None:
    """Weights of a slot that no row chose may be nan: no product meets them."""
    case = Case([[0, 2], [2, 5]], 6, 48, 48)
    for slot in (1, 3, 4):
        case.w13[slot] = case.w2[slot] = float("nan")
    for tile in TILES:
        case.check(tile)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    alone = Case([[1]], 2, 64, 64, dtype=torch.float16)
    crowd = Case([[1]] * 20, 2, 64, 64, dtype=torch.float16)
    crowd.w13, crowd.w2 = alone.w13, alone.w2
    crowd.x_TD[7] = alone.x_TD[0]
    crowd.x_TD[3] = float("nan")
    for tile in TILES:
        one = gate_up(alone.x_TD, alone.w13, alone.schedule, 1, tile=tile)
        many = gate_up(crowd.x_TD, crowd.w13, crowd.schedule, 1, tile=tile)
        torch.testing.assert_close(many[7], one[0], **TOLERANCE[torch.float16])
        assert many[3].isnan().all() and not many[[2, 4]].isnan().any()


def test_refuses_what_does_not_fit() -> None:
    case = Case([[0, 1]], 2, 32, 16)
    x_TD, w13, schedule = case.x_TD, case.w13, case.schedule
    h_RF = gate_up(x_TD, w13, schedule, 2)
    with pytest.raises(ValueError, match="x_TD has shape"):
        gate_up(x_TD[:, :16], w13, schedule, 2)
    with pytest.raises(ValueError, match="w13 has shape .* wanted .*contiguous"):
        gate_up(x_TD, w13.mT.contiguous().mT, schedule, 2)
    with pytest.raises(ValueError, match="multiples of 16"):
        gate_up(x_TD[:, :24].contiguous(), w13[:, :, :24].contiguous(), schedule, 2)
    with pytest.raises(ValueError, match="float8_e4m3fn with scales"):
        gate_up(x_TD, w13.half(), schedule, 2)
    with pytest.raises(ValueError, match="without scales"):
        gate_up(x_TD, quantize(w13)[0], schedule, 2)
    with pytest.raises(ValueError, match="scales are torch.float64; wanted float32"):
        gate_up(x_TD, quantize(w13)[0], schedule, 2, quantize(w13)[1].double())
    with pytest.raises(ValueError, match="w2 has shape"):
        down(h_RF, case.w2[:1], case.weights_TK, schedule)
    with pytest.raises(ValueError, match="the schedule wants float32, 2 in all"):
        down(h_RF, case.w2, case.weights_TK.double(), schedule)
