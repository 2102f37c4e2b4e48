"""Parts of the plugin that need no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin import worker_cls_for
from emo_serve.vllm_plugin.batch_pools import PoolRows, attach_to_v1_runner
from emo_serve.vllm_plugin.contract import (
    ACCOUNT_ARG,
    MASS_SLOT_ARG,
    MASS_SLOTS,
    NO_ACCOUNT,
    NO_MASS_SLOT,
    POOL_ROW_ARG,
    RequestTag,
    expert_bytes,
)
from emo_serve.vllm_plugin.packed import ExpertShape
from emo_serve.vllm_plugin.routing_record import RoutingRecord, StepRequests

CPU = torch.device("cpu")


def test_pool_row_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    rows = PoolRows(10, 4, CPU)
    assert rows.tag_of(SimpleNamespace(extra_args={POOL_ROW_ARG: 3})) == RequestTag(3)
    assert rows.tag_of(SimpleNamespace(extra_args={"other": 3})) == RequestTag(0)
    assert rows.tag_of(SimpleNamespace(extra_args=None)) == RequestTag(0)
    assert rows.tag_of(None) == RequestTag(0)
    counted = {POOL_ROW_ARG: 3, ACCOUNT_ARG: 2**40, MASS_SLOT_ARG: MASS_SLOTS - 1}
    tag = rows.tag_of(SimpleNamespace(extra_args=counted))
    assert tag == RequestTag(3, 2**40, MASS_SLOTS - 1)
    assert not caplog.records


@pytest.mark.parametrize(
    "row", [4, -1, -5, 2**70, True, 1.0, float("nan"), "1", "x" * 1000, None, [1], {"row": 1}]
)
def test_what_is_no_row_is_the_base_pools(caplog: pytest.LogCaptureFixture, row: object) -> None:
    rows = PoolRows(10, 4, CPU)
    for _ in range(2):
        assert rows.tag_of(SimpleNamespace(extra_args={POOL_ROW_ARG: row})) == RequestTag(0)
    (record,) = caplog.records  # a client could fill the log
    assert "none of the 4 rows; such requests" in record.message and len(record.message) < 200


@pytest.mark.parametrize("value", [-2, 2**70, True, 1.5, "1", None, [1], MASS_SLOTS])
def test_what_is_no_mass_slot_or_account_is_none(value: object) -> None:
    rows = PoolRows(10, 4, CPU)
    slot = rows.tag_of(SimpleNamespace(extra_args={MASS_SLOT_ARG: value}))
    assert slot.mass_slot == NO_MASS_SLOT
    if value != MASS_SLOTS:
        assert rows.tag_of(SimpleNamespace(extra_args={ACCOUNT_ARG: value})).account == NO_ACCOUNT


# -- bytes of an expert --


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("expert_dtype", "dtype"),
    [("auto", torch.bfloat16), ("auto", torch.float32), ("fp8_e4m3", torch.float8_e4m3fn)],
)
def test_a_slot_takes_what_the_front_end_counts(
    expert_dtype: str, dtype: torch.dtype, num_ranks: int
) -> None:
    counted = expert_bytes(64, 96, expert_dtype, dtype.itemsize, num_ranks)
    shape = ExpertShape(64, 96 // num_ranks, dtype)
    in_slab, elsewhere = shape.slab(3).slot(2), shape.view(torch.zeros(counted, dtype=torch.uint8))
    assert counted == shape.num_bytes == in_slab.num_bytes == elsewhere.num_bytes
    for one, other in zip(in_slab.tensors(), elsewhere.tensors(), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        other.copy_(torch.randn(one.shape))  # parts that lay on each other would differ below
        one.copy_(other)
    assert all(map(torch.equal, in_slab.tensors(), elsewhere.tensors()))


def test_an_expert_is_divided_among_the_devices() -> None:
    released = expert_bytes(2048, 1024, "auto", dtype_bytes=2)
    assert released == 3 * 2048 * 1024 * 2
    assert expert_bytes(2048, 1024, "auto", 2, tensor_parallel_size=4) == released // 4
    fp8 = expert_bytes(2048, 1024, "fp8_e4m3", dtype_bytes=2)
    assert fp8 == 3 * 2048 * 1024 + 4 * (2 * 1024 + 2048)
    # Every device scales all rows of w2, of which it holds some columns.
    half = expert_bytes(2048, 1024, "fp8_e4m3", 2, tensor_parallel_size=2)
    assert half == (fp8 + 4 * 2048) // 2
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3 does not divide"):
        expert_bytes(2048, 1024, "auto", 2, tensor_parallel_size=3)


# -- rows of a batch --


def test_one_row_per_token_and_padding_has_none() -> None:
    rows = PoolRows(10, 8, CPU)
    assert rows.buffer_T.tolist() == [0] * 10, "vLLM measures memory before the first batch"
    first = rows.fill([RequestTag(4), RequestTag(2), RequestTag(7)], np.array([0, 3, 4, 6]), None)
    assert first.tolist() == [4, 4, 4, 2, 7, 7, -1, -1, -1, -1]
    second = rows.fill([RequestTag(5)], np.array([0, 1]), None)
    assert second.tolist() == [5] + [-1] * 9
    assert first.data_ptr() == second.data_ptr(), "CUDA graphs need one address"


def test_rows_go_to_the_buffer_of_a_model_that_has_one() -> None:
    """vLLM's own models take no argument more: their layers read a buffer of the model's."""
    model = torch.nn.Module()
    rows = PoolRows(4, 8, CPU)
    rows.use_buffer_of(model)
    assert set(rows.arguments) == {"pool_rows"}
    model.pool_rows = torch.zeros(4, dtype=torch.int64)
    rows.use_buffer_of(model)
    assert not rows.arguments
    rows.fill([RequestTag(4), RequestTag(2)], np.array([0, 2, 3]), None)
    assert model.pool_rows.tolist() == [4, 4, 2, -1]


def test_a_step_like_the_last_one_is_recorded_and_its_rows_stand() -> None:
    rows, record = PoolRows(6, 8, CPU), RecordOfCalls()
    ends = np.zeros(3, dtype=np.int32)  # vLLM's own, written anew for each step
    steps: list[tuple[list[tuple[int, int]], list[int], list[int] | None]] = [
        ([(4, 1), (2, 2)], [3, 1], [4, 4, 4, 2, -1, -1]),
        ([(4, 1), (2, 2)], [1, 1], [4, 2, -1, -1, -1, -1]),
        ([(4, 1), (2, 2)], [1, 1], None),
        ([(4, 3), (2, 2)], [1, 1], [4, 2, -1, -1, -1, -1]),
        ([(2, 2), (4, 3)], [1, 1], [2, 4, -1, -1, -1, -1]),
        ([(2, 2), (4, 3)], [3, 1], [2, 2, 2, 4, -1, -1]),
    ]
    for requests, lengths, expected in steps:
        ends[1:] = np.cumsum(lengths)
        tags = [RequestTag(row, account) for row, account in requests]
        rows.buffer_T.fill_(9)
        filled = rows.fill(tags, ends, cast(RoutingRecord, record))
        assert filled.tolist() == (expected or [9] * 6), "a repeated step writes nothing"
        assert record.steps[-1].tags == tags
        assert record.steps[-1].lengths.tolist() == lengths
        assert record.steps[-1].num_tokens == sum(lengths)
    assert len(record.steps) == len(steps)


def test_every_step_of_the_v1_runner_reads_one_buffer() -> None:
    record = RecordOfCalls()
    requests = {name: request_of(row) for name, row in (("a", 4), ("b", 2))}
    runner = SimpleNamespace(
        max_num_tokens=8,
        device=CPU,
        requests=requests,
        input_batch=SimpleNamespace(num_reqs=2, req_ids=["b", "a", None]),
        query_start_loc=SimpleNamespace(np=np.array([0, 1, 4, 4, 4])),
        _init_model_kwargs=lambda num_reqs=None: {"upstream": num_reqs},
        get_model=lambda: SimpleNamespace(slot_host=SimpleNamespace(record=record)),
        speculative_config=None,
    )
    attach_to_v1_runner(runner, num_rows=5)
    captured = runner._init_model_kwargs(num_reqs=0)
    assert captured["upstream"] == 0 and captured["pool_rows"].tolist() == [0] * 8
    real = runner._init_model_kwargs()
    assert real["pool_rows"].tolist() == [2, 4, 4, 4] + [-1] * 4
    assert real["pool_rows"].data_ptr() == captured["pool_rows"].data_ptr()
    assert record.num_pauses == 1
    ((tags, lengths, num_tokens),) = record.steps
    assert ([tag.row for tag in tags], lengths.tolist(), num_tokens) == ([2, 4], [1, 3], 4)


def test_the_v1_runner_tells_the_record_which_drafts_it_rejected() -> None:
    record = RecordOfCalls()
    sampled = torch.tensor([[5, 6, 7, 8], [5, -1, -1, -1], [5, 9, -1, -1], [5, -1, -1, -1]])
    runner = SimpleNamespace(
        max_num_tokens=8,
        device=CPU,
        _init_model_kwargs=lambda num_reqs=None: {},
        get_model=lambda: SimpleNamespace(slot_host=SimpleNamespace(record=record)),
        speculative_config=SimpleNamespace(method="ngram"),
        _sample=lambda logits, metadata: SimpleNamespace(sampled_token_ids=sampled),
    )
    attach_to_v1_runner(runner, num_rows=5)
    assert runner._sample(None, None).sampled_token_ids is sampled and not record.rejected
    runner._sample(None, SimpleNamespace(num_draft_tokens=[3, 2, 3, 0]))
    assert record.rejected == [[0, 2, 2, 0]]


class RecordOfCalls:
    """What the runner tells the routing record."""

    def __init__(self) -> None:
        self.num_pauses = 0
        self.steps: list[StepRequests] = []
        self.rejected: list[list[int]] = []

    def pause(self) -> None:
        self.num_pauses += 1

    def begin(self, step: StepRequests) -> None:
        self.steps.append(step)

    def reject(self, num_rejected_R: torch.Tensor) -> None:
        self.rejected.append(num_rejected_R.tolist())


def request_of(row: int) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args={POOL_ROW_ARG: row}))


def test_worker_classes() -> None:
    assert worker_cls_for("cpu").endswith("EmoCpuWorker")
    assert worker_cls_for("cuda").endswith("EmoGpuWorker")
    with pytest.raises(ConfigError, match="'tpu' is not supported"):
        worker_cls_for("tpu")
