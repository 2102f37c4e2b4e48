"""The schedule's kernels against its promises and its twin; its work follows the experts hit."""

from __future__ import annotations

import sys
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emo_kernels import reference
from emo_kernels.dispatch import _dispatch, dispatch
from emo_kernels.routing import route
from emo_kernels.tables import NO_SLOT, PoolTables, Router, Schedule
from tests.support.kernel_batches import DEVICE, batch_of, check_schedule, chosen_slots


def checked(slots_TK: Tensor, num_slots: int, block_m: int, most_rows: int = 4096) -> Schedule:
    """Return the schedule, having compared it with all that it promises and with the twin."""
    schedule = _dispatch(slots_TK, num_slots, block_m, most_rows)
    check_schedule(schedule, slots_TK, num_slots)
    twin = reference.dispatch(slots_TK, num_slots, block_m)
    num_rows, num_tiles = int(twin.offsets_S1[-1]), int(twin.num_tiles)
    defined = {"rows_R": num_rows, "tile_slots": num_tiles, "tile_starts": num_tiles}
    for field in fields(Schedule):
        got, expected = getattr(schedule, field.name), getattr(twin, field.name)
        if isinstance(got, Tensor):
            assert got.shape == expected.shape
            assert got.dtype == torch.int32
            end = defined.get(field.name)
            assert torch.equal(got[:end], expected[:end])
    assert schedule.block_m == twin.block_m
    return schedule


def slots_of(*tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int32, device=DEVICE)


@settings(deadline=None, max_examples=60)
@given(chosen_slots(), st.sampled_from([1, 2, 4, 16]))
def test_one_kernel(case: tuple[Tensor, int], block_m: int) -> None:
    checked(*case, block_m)


@settings(deadline=None, max_examples=30)
@given(chosen_slots(), st.sampled_from([1, 2, 16]), st.sampled_from([32, 64]))
def test_blocks_of_rows(case: tuple[Tensor, int], block_m: int, most_rows: int) -> None:
    checked(*case, block_m, most_rows)


@pytest.mark.parametrize("top_k", [8, 3])
def test_more_rows_than_one_kernel_takes(top_k: int) -> None:
    slots_TK = torch.randint(
        NO_SLOT, 3, (1400, top_k), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    slots_TK = slots_TK.to(DEVICE)
    check_schedule(dispatch(slots_TK, 3, 64), slots_TK, 3)


def test_sums_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the module; `emo_kernels.dispatch` is the function.
    monkeypatch.setattr(sys.modules[dispatch.__module__], "_SUM_TILE", 64)
    slots_TK = torch.arange(1200, dtype=torch.int32, device=DEVICE).remainder(3).view(-1, 4)
    checked(slots_TK, 3, 16, most_rows=64)  # 4 blocks' counts at a time, there are 19


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("num_slots", [1, 7])
def test_few_tokens(num_tokens: int, num_slots: int) -> None:
    slots_TK = torch.zeros(num_tokens, 2, dtype=torch.int32, device=DEVICE)
    assert checked(slots_TK, num_slots, 16).num_tiles.tolist() == [num_tokens]


@pytest.mark.parametrize("most_rows", [4096, 32])
def test_padding_alone_has_no_tiles(most_rows: int) -> None:
    slots_TK = torch.full((9, 4), NO_SLOT, dtype=torch.int32, device=DEVICE)
    schedule = checked(slots_TK, 5, 16, most_rows)
    assert schedule.num_tiles.tolist() == [0]
    assert schedule.offsets_S1.tolist() == [0] * 6


def test_empty_and_single_row_slots() -> None:
    schedule = checked(slots_of([4, 1], [4, NO_SLOT], [6, 4]), 8, 2)
    assert schedule.offsets_S1.tolist() == [0, 0, 1, 1, 1, 4, 4, 5, 5]
    assert schedule.tile_slots[:4].tolist() == [1, 4, 4, 6]
    assert schedule.tile_starts[:4].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("most_rows", [4096, 256])
def test_one_hot_slot(most_rows: int) -> None:
    slots_TK = torch.full((300, 2), 3, dtype=torch.int32, device=DEVICE)
    slots_TK[17, 1] = 0
    schedule = checked(slots_TK, 6, 8, most_rows)
    assert schedule.num_tiles.tolist() == [1 + 75]


def test_every_slot_of_1024() -> None:
    slots_TK = torch.arange(1024, dtype=torch.int32, device=DEVICE).flip(0).view(128, 8)
    schedule = checked(slots_TK, 1024, 64)
    assert schedule.num_tiles.tolist() == [1024]


def test_ids_that_are_no_slot_are_no_work() -> None:
    slots_TK = slots_of([2, 3], [-7, 1 << 20], [0, 2])
    got = dispatch(slots_TK, 3, 2)
    slots_TK[(slots_TK < 0) | (slots_TK > 2)] = NO_SLOT
    check_schedule(got, slots_TK, 3)


# -- work follows the experts hit --


@pytest.mark.parametrize("num_slots", [8, 64, 200])
def test_tiles_do_not_depend_on_the_number_of_slots(num_slots: int) -> None:
    slots_TK = slots_of(*[[0, 5], [5, 7], [5, 0], [5, 7], [5, NO_SLOT]])
    schedule = checked(slots_TK, num_slots, 2)
    assert schedule.num_tiles.tolist() == [1 + 3 + 1]  # 2, 5 and 2 rows
    assert schedule.tile_slots.shape[0] <= slots_TK.numel()


@pytest.mark.parametrize("num_experts", [16, 64, 250])
def test_tiles_do_not_depend_on_the_number_of_experts(num_experts: int) -> None:
    few = batch_of(Router(16, 3), [range(8), range(4, 12)], [0, 1] * 6)
    more = num_experts - 16
    tables = few.tables
    wide = replace(
        few,
        router=Router(num_experts, 3),
        logits_TE=torch.nn.functional.pad(few.logits_TE, (0, more), value=99.0),
        tables=PoolTables(
            torch.nn.functional.pad(tables.members_PE, (0, more)),
            tables.temperatures_P,
            torch.nn.functional.pad(tables.slot_of_expert_E, (0, more)),
        ),
    )
    schedules = [dispatch(route(*batch.args).slots_TK, 16, 4) for batch in (few, wide)]
    assert schedules[0].num_tiles.tolist() == schedules[1].num_tiles.tolist()


def test_pools_that_chose_the_same_expert_share_its_tile() -> None:
    batch = batch_of(Router(32, 2), [{3, 7}, {7, 20}, {3, 20}], [0, 1, 2, 2, 1, 0, 0, 1])
    schedule = checked(route(*batch.args).slots_TK, 32, 16)
    slots = batch.tables.slot_of_expert_E[torch.tensor([3, 7, 20], device=DEVICE)]
    assert schedule.num_tiles.tolist() == [3]  # not 6: one an expert, not one a pool's expert
    assert schedule.tile_slots[:3].tolist() == sorted(slots.tolist())


def test_what_does_not_fit_is_refused() -> None:
    slots_TK = slots_of([0, 1], [1, 0])
    with pytest.raises(ValueError, match=r"slots_TK is torch.int64 of shape \(2, 2\)"):
        dispatch(slots_TK.long(), 2, 16)
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        dispatch(slots_TK.t(), 2, 16)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        dispatch(slots_TK.flatten(), 2, 16)
    with pytest.raises(ValueError, match="num_slots is 0"):
        dispatch(slots_TK, 0, 16)
    with pytest.raises(ValueError, match="block_m is 24; wanted a power of two"):
        dispatch(slots_TK, 2, 24)
