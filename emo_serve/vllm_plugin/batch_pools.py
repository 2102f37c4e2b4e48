"""Which pool each token of a batch routes within: request -> pool row -> one row per token.

vLLM has two model runners, and each keeps its requests in its own way. This module holds what they
share. `PoolRows` turns one row per request into one row per token, in a buffer that never moves, as
CUDA graphs require, and tells the `RoutingRecord` whose tokens are coming. `attach_to_v1_runner`
gives the V1 runner (CPU) its rows; the V2 runner (CUDA's default) finds `EmoModelState` through the
model. EMO's model takes the buffer as an argument of `forward`. vLLM's own models take none: there
the buffer is the model's, its attribute `pool_rows`, which its layers read.

Drafted tokens (n-gram speculative decoding) are tokens of their request like all others: both
runners count them in `query_start`, so they route in the request's pool. Which of them were
rejected is known after sampling; the record then leaves them out.

A row comes from the front end or, under plain `vllm serve`, from any client. An invalid row must
not reach the device, where a kernel would read past the table, and must not raise, which would end
the engine. Such a request routes in the base pool, as if it named no pool. Padding would be wrong
here: it would leave wrong values in a prefix cache that other requests share.

Upstream: vllm 0.32.0, v1/worker/gpu_model_runner.py (_init_model_kwargs, _sample) and
v1/worker/gpu/model_states/default.py (DefaultModelState).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from emo_serve.vllm_plugin.contract import BASE_POOL_ROW, POOL_ROW_ARG, RequestTag
from emo_serve.vllm_plugin.routing_record import RoutingRecord, StepRequests
from emo_serve.vllm_plugin.settings import read_settings
from emo_serve.vllm_plugin.slot_host import slot_host_of

__all__ = [
    "PADDING_ROW",
    "EmoModelState",
    "PoolRows",
    "attach_to_v1_runner",
]

logger = logging.getLogger(__name__)

PADDING_ROW = -1
"""The row of padding tokens, which take no expert."""


class PoolRows:
    """One pool row per token, int64, in one persistent buffer of `max_num_tokens`.

    Before the first batch every token has the base pool's row, so that the run in which vLLM
    measures memory does real work. `num_rows` is the number of rows in the pool tables.
    """

    def __init__(self, max_num_tokens: int, num_rows: int, device: torch.device) -> None:
        self.buffer_T = torch.full((max_num_tokens,), BASE_POOL_ROW, device=device)
        self._is_argument = True
        self._num_rows = num_rows
        self._step = StepRequests((), np.empty(0, np.int32), 0)
        self._ends = b""
        self._has_warned = False

    def use_buffer_of(self, model: nn.Module) -> None:
        """Write to the model's own buffer from now on, if it has one."""
        buffer_T = getattr(model, "pool_rows", None)
        if buffer_T is not None:
            self.buffer_T, self._is_argument = buffer_T, False

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Return what the model's forward takes for the rows: the buffer, or nothing."""
        return {"pool_rows": self.buffer_T} if self._is_argument else {}

    def tag_of(self, sampling_params: Any) -> RequestTag:
        """Return a request's tag, with the base pool's row if it names none or an invalid one."""
        extra_args = getattr(sampling_params, "extra_args", None) or {}
        tag = RequestTag.from_extra_args(extra_args, self._num_rows)
        named = extra_args.get(POOL_ROW_ARG, BASE_POOL_ROW)
        if type(named) is not int or named != tag.row:
            self._warn_of(named)
        return tag

    def _warn_of(self, row: object) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "a request carries %s %.40r, which is none of the %d rows; such requests route in the"
            " base pool",
            POOL_ROW_ARG,
            row,
            self._num_rows,
        )

    def fill(
        self, tags: Sequence[RequestTag], query_start: np.ndarray, record: RoutingRecord | None
    ) -> Tensor:
        """Write the rows of a batch and return the whole buffer; the rest is padding.

        `query_start` holds the first token of each request and, last, the number of tokens. Does
        not wait for the device, where a running step may still read the last batch's rows. Most
        steps have the same requests as the step before; then nothing is written.
        """
        ends = query_start.tobytes()
        if ends != self._ends or tags != self._step.tags:
            self._ends = ends
            self._step = StepRequests(tags, np.diff(query_start), int(query_start[-1]))
            row_of_request = np.array([tag.row for tag in tags], dtype=np.int64)
            rows_T = np.repeat(row_of_request, self._step.lengths)
            async_tensor_h2d(rows_T, out=self.buffer_T[: len(rows_T)])
            self.buffer_T[len(rows_T) :].fill_(PADDING_ROW)
        if record is not None:
            record.begin(self._step)
        return self.buffer_T


def attach_to_v1_runner(runner: Any, num_rows: int) -> None:
    """Make a V1 model runner bring each step's pool rows to the model."""
    rows = PoolRows(runner.max_num_tokens, num_rows, runner.device)
    upstream = runner._init_model_kwargs

    def tag_of(state: Any) -> RequestTag:
        tag: RequestTag | None = getattr(state, "emo_tag", None)
        if tag is None:
            tag = state.emo_tag = rows.tag_of(state.sampling_params)
        return tag

    def with_pool_rows(num_reqs: int | None = None) -> dict[str, Any]:
        kwargs: dict[str, Any] = upstream(num_reqs)
        model = runner.get_model()
        record: RoutingRecord | None = model.slot_host.record
        rows.use_buffer_of(model)
        if num_reqs == 0:  # how vLLM marks a dummy run, such as the capture of a CUDA graph
            if record is not None:
                record.pause()
            return {**kwargs, **rows.arguments}
        batch = runner.input_batch
        tags = [tag_of(runner.requests[id]) for id in batch.req_ids[: batch.num_reqs]]
        query_start = runner.query_start_loc.np[: batch.num_reqs + 1]
        rows.fill(tags, query_start, record)
        return {**kwargs, **rows.arguments}

    runner._init_model_kwargs = with_pool_rows
    runner.emo_pool_rows = rows
    if runner.speculative_config is not None:
        _leave_out_rejected_drafts(runner)


def _leave_out_rejected_drafts(runner: Any) -> None:
    """Have a V1 model runner tell the record which drafts it rejected."""
    upstream = runner._sample

    def sample(logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        output = upstream(logits, spec_decode_metadata)
        record: RoutingRecord | None = runner.get_model().slot_host.record
        if spec_decode_metadata is not None and record is not None:
            drafted_R = np.array(spec_decode_metadata.num_draft_tokens)
            num_sampled_R = (output.sampled_token_ids != PLACEHOLDER_TOKEN_ID).sum(1)
            record.reject(_num_rejected(drafted_R, num_sampled_R))
        return output

    runner._sample = sample


def _num_rejected(drafted_R: np.ndarray, num_sampled_R: Tensor) -> Tensor:
    """Return how many drafts of each request were rejected: one token is sampled without a draft.

    A request in the midst of its prompt has no drafts, and what it samples does not count.
    """
    drafted: Tensor = async_tensor_h2d(drafted_R, num_sampled_R.device)
    return drafted - (num_sampled_R - 1).clamp(min=0).minimum(drafted)


class EmoModelState(DefaultModelState):
    """Give the V2 model runner its pool rows."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._tag_of_state = [RequestTag()] * self.max_num_reqs
        self._record = slot_host_of(model).record
        num_rows = read_settings(vllm_config).num_pools
        self._rows = PoolRows(self.max_num_tokens, num_rows, device)
        self._rows.use_buffer_of(model)
        self._drafted_R: np.ndarray | None = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._tag_of_state[req_index] = self._rows.tag_of(new_req_data.sampling_params)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        kwargs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        num_reqs = input_batch.num_reqs
        # vLLM's warm-up runs come here, too, in row 0, before any pool has it.
        tags = [self._tag_of_state[index] for index in input_batch.idx_mapping_np[:num_reqs]]
        query_start = input_batch.query_start_loc_np[: num_reqs + 1]
        self._rows.fill(tags, query_start, self._record)
        self._drafted_R = input_batch.num_draft_tokens_per_req
        return {**kwargs, **self._rows.arguments}

    def postprocess_state(self, idx_mapping: Tensor, num_sampled: Any, *args: Any) -> None:
        super().postprocess_state(idx_mapping, num_sampled, *args)
        if self._drafted_R is not None and self._record is not None:
            self._record.reject(_num_rejected(self._drafted_R, num_sampled))
            self._drafted_R = None

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        kwargs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self._record is not None:
            self._record.pause()
        return {**kwargs, **self._rows.arguments}
