"""The server's own requests stand in no figure of vLLM's, whatever they share a step with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerStats

from emo_serve.residency.manager import Lease
from emo_serve.server.vllm_adapter.engine import OwnRequests
from emo_serve.server.vllm_adapter.own_figures import leave_out

OWN = "emo-serve-1a-"


class Engine:
    """What AsyncLLM's output handler has: the real output processor, and a manager that records."""

    def __init__(self) -> None:
        self.output_processor = OutputProcessor(None, log_stats=True)
        self.logger_manager = SimpleNamespace(record=self._record)
        self.recorded: list[dict[str, Any]] = []
        self.collectors: dict[str, RequestOutputCollector] = {}

    def add(self, request_id: str, prompt_tokens: int = 3) -> str:
        params = SamplingParams(max_tokens=1, detokenize=False)
        request = EngineCoreRequest(
            *(f"{request_id}-0a1b2c3d", [1] * prompt_tokens, None, params, None, 1.0),
            *(None, None, None),
            external_req_id=request_id,
        )
        collector = RequestOutputCollector(params.output_kind, request.request_id)
        self.output_processor.add_request(request, None, queue=collector)
        self.collectors[request_id] = collector
        return request.request_id

    def step(self, *request_ids: str, chunk: int = 100) -> IterationStats:
        """Handle a step that finishes these requests, as the handler does."""
        outputs = [self._output(request_id) for request_id in request_ids]
        stats = IterationStats()
        for start in range(0, len(outputs), chunk):
            part = outputs[start : start + chunk]
            done = self.output_processor.process_outputs(part, 2.0, stats, weight_version="w")
            assert not done.request_outputs and not done.reqs_to_abort
        record = self.logger_manager.record
        record(engine_idx=0, scheduler_stats=SchedulerStats(), iteration_stats=stats)
        return stats

    def _output(self, request_id: str) -> EngineCoreOutput:
        prefill = PrefillStats()
        prefill.set(3, 0, 0)
        reason = FinishReason.LENGTH
        return EngineCoreOutput(request_id, [7], finish_reason=reason, prefill_stats=prefill)

    def _record(self, scheduler_stats: Any, iteration_stats: Any, **rest: Any) -> None:
        self.recorded.append({"scheduler": scheduler_stats, "iteration": iteration_stats, **rest})


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    leave_out(engine, OWN)
    return engine


def counted(stats: IterationStats) -> tuple[int, ...]:
    return (
        stats.num_prompt_tokens,
        stats.num_generation_tokens,
        *map(len, (stats.time_to_first_tokens_iter, stats.finished_requests, stats.n_params_iter)),
    )


def test_a_step_of_own_requests_is_recorded_without_answers(engine: Engine) -> None:
    engine.step(engine.add(f"{OWN}warm-up"))
    (recorded,) = engine.recorded
    assert recorded["iteration"] is None
    assert (type(recorded["scheduler"]), recorded["engine_idx"]) == (SchedulerStats, 0)
    assert engine.collectors[f"{OWN}warm-up"].get_nowait().finished  # type: ignore[union-attr]
    assert not engine.output_processor.has_unfinished_requests()


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_shared_step_counts_what_is_the_users(
    engine: Engine, chunk: int, order: tuple[int, ...]
) -> None:
    ids = [engine.add(f"{OWN}probe-1"), engine.add("cmpl-1"), engine.add(f"{OWN}probe-2")]
    stats = engine.step(*(ids[place] for place in order), chunk=chunk)
    assert engine.recorded[0]["iteration"] is stats
    assert counted(stats) == (3, 1, 1, 1, 1)
    assert stats.finished_requests[0].request_id == "cmpl-1"
    assert all(one.get_nowait().finished for one in engine.collectors.values())  # type: ignore[union-attr]


def test_users_alone_are_counted_as_before(engine: Engine) -> None:
    stats = engine.step(engine.add("cmpl-1"), engine.add("chatcmpl-emo-serve-1a-x"))
    assert (engine.recorded[0]["iteration"], counted(stats)) == (stats, (6, 2, 2, 2, 2))
    engine.step(engine.add(f"{OWN}probe-1"))
    assert engine.recorded[1]["iteration"] is None


def test_without_statistics_outputs_are_handled_all_the_same() -> None:
    engine = Engine()
    engine.output_processor.log_stats = False
    processor, engine.logger_manager = engine.output_processor, None  # type: ignore[assignment]
    leave_out(engine, OWN)
    outputs = [engine._output(engine.add(name)) for name in (f"{OWN}probe-1", "cmpl-1")]
    processor.process_outputs(outputs, 2.0, None)
    assert not processor.has_unfinished_requests()


async def test_own_requests_have_ids_that_no_client_knows_and_read_no_cache() -> None:
    asked: list[tuple[str, SamplingParams]] = []

    class Generating(Engine):
        async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any) -> Any:
            asked.append((request_id, params))
            for output in ():
                yield output

    pool = SimpleNamespace(content_hash="ab")
    for engine in (Generating(), Generating()):
        own = OwnRequests(engine)  # type: ignore[arg-type]
        await own.warm_up(pool, 1)  # type: ignore[arg-type]
        await own.run_probe(Lease(1, pool), [1, 2], 0, 0)  # type: ignore[arg-type]
        for request_id, _ in asked[-2:]:
            engine.step(engine.add(request_id))
        assert [recorded["iteration"] for recorded in engine.recorded] == [None, None]
    prefixes = {request_id.rpartition("-")[0].removesuffix("-warm") for request_id, _ in asked}
    assert len({prefix.removesuffix("-probe") for prefix in prefixes}) == 2
    assert all(params.skip_reading_prefix_cache for _, params in asked)
