"""The step around `generate`: pool, lease, salt, row; with vLLM's engine replaced by a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from emo_serve.errors import (
    Draining,
    EmoServeError,
    EngineDead,
    LoadDeadlineExceeded,
    RequestError,
    Unavailable,
)
from emo_serve.metrics import PoolMetrics
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.backlog import BacklogLimits
from emo_serve.server.asgi.context import RequestContext
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.coverage import CoverageSum
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.generation import PooledLLM
from tests.support.fake_engine import FakeEngine, settle
from tests.support.pool_services import ServiceUnderTest, service_of


def output(text: str, tokens: list[int], *, finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(0, text, tokens, None, None)
    return RequestOutput("id", None, [7, 8, 9], None, [completion], finished)


class Script:
    """Stand for AsyncLLM: yield what the test puts in, and note what it was given."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self.calls: list[tuple[Any, SamplingParams, str, dict[str, Any]]] = []
        self.aborted: list[str] = []
        self.refuses_with: Exception | None = None

    def feed(self, *outputs: RequestOutput | Exception) -> None:
        for item in outputs:
            self.outputs.put_nowait(item)

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        is_finished = False
        try:
            await self.add_request(prompt, params, request_id, **options)
            while not is_finished:
                item = await self.outputs.get()
                if isinstance(item, Exception):
                    raise item
                is_finished = item.finished
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    async def add_request(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> None:
        if self.refuses_with is not None:
            raise self.refuses_with
        self.calls.append((prompt, params, request_id, options))


class Bench:
    """A client over a script and a service, with the pools math and code loaded."""

    def __init__(self, service: ServiceUnderTest, script: Script) -> None:
        self.service, self.script = service, script
        self.sums: dict[int, CoverageSum] = {}  # what the workers will say
        self.coverage = CoverageBook(self._read, lambda pool, share: None)
        self.registry = CollectorRegistry()
        names = [pool.name for pool in service.lookup.pools]
        self.metrics = PoolMetrics(self.registry, names, REFUSAL_REASONS)
        self.llm = self.client()

    def client(
        self, *, honours_priority: bool = False, max_sequences: int | None = None
    ) -> PooledLLM:
        engine: Any = self.script
        return PooledLLM(
            engine,
            self.service.residency,
            self.metrics,
            self.coverage,
            honours_priority=honours_priority,
            max_sequences=max_sequences,
        )

    async def _read(self) -> dict[int, CoverageSum]:
        sums, self.sums = self.sums, {}
        return sums

    def generate(self, model: str | None, prompt: Any = None, **options: Any) -> Any:
        params = options.pop("params", SamplingParams(output_kind=RequestOutputKind.DELTA))
        adapter = None if model is None else LoRARequest(model, 1, "x")
        prompt = tokens_input([7, 8, 9]) if prompt is None else prompt
        return self.llm.generate(prompt, params, "id", lora_request=adapter, **options)

    def running(self, name: str) -> int:
        return self.service.statuses.of(self.service.lookup.find(name)).running_requests

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"emo_serve_{name}", labels)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def bench(engine: FakeEngine) -> Bench:
    script = Script()
    service = service_of(engine, slots=6, rows=4)
    for name in ("math", "code"):
        await service.manager.load(service.lookup.find(name))
    return Bench(service, script)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> RequestContext:
    """The HTTP request that all of a test's generation belongs to."""
    context = RequestContext()
    monkeypatch.setattr("emo_serve.server.vllm_adapter.generation.current_request", lambda: context)
    return context


async def read(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [item async for item in stream]


async def test_a_request_is_placed_in_its_pools_row_with_its_pools_salt(bench: Bench) -> None:
    bench.script.feed(output("a", [1], finished=True))
    params = SamplingParams(extra_args={"emo_pool_row": 77, "mine": 1})
    prompt = tokens_input([7, 8, 9], cache_salt="client")
    await read(bench.generate("math", prompt, params=params, priority=3, trace_headers=None))
    ((seen_prompt, seen_params, request_id, options),) = bench.script.calls
    math = bench.service.lookup.find("math")
    ours = {"emo_pool_row": 1, "emo_account": 1, "emo_mass_slot": -1, "emo_streamed": False}
    assert seen_params.extra_args == {**ours, "mine": 1}
    assert seen_prompt == {**prompt, "cache_salt": f"emo:{math.content_hash}:client"}
    assert (request_id, options) == ("id", {"priority": 0, "trace_headers": None})
    assert params.extra_args == {"emo_pool_row": 77, "mine": 1}  # the caller's, who may share it
    assert prompt["cache_salt"] == "client"


async def test_priority_is_the_clients_where_the_operator_wants_it(bench: Bench) -> None:
    """Without --scheduling-policy priority, a client's priority is ignored, as by vLLM itself."""
    for honours, expected in ((False, 0), (True, -9)):
        bench.llm = bench.client(honours_priority=honours)
        bench.script.feed(output("a", [1], finished=True))
        await read(bench.generate("math", priority=-9))
        assert bench.script.calls[-1][3]["priority"] == expected


@pytest.mark.parametrize("ending", ["finished", "failed", "left"])
async def test_coverage_is_settled_however_the_request_ends(
    bench: Bench, context: RequestContext, ending: str
) -> None:
    context.wants_coverage = True
    bench.sums = {1: CoverageSum(1.5, 3), 2: CoverageSum(1.0, 1)}
    if ending == "finished":
        bench.script.feed(output("a", [1], finished=True))
        await read(bench.generate("math"))
    elif ending == "failed":
        bench.script.feed(EngineGenerateError("no"))
        with pytest.raises(EngineGenerateError):
            await read(bench.generate("math"))
    else:
        bench.script.feed(output("a", [1]))
        stream = bench.generate("math")
        await anext(stream)
        await stream.aclose()
    (covered,) = context.coverages
    assert await covered == CoverageSum(1.5, 3)
    assert context.pool_names == ["math"]
    assert bench.coverage.num_accounts == 0


async def test_a_request_that_never_got_its_pool_has_no_coverage(
    bench: Bench, context: RequestContext
) -> None:
    context.wants_coverage = True
    stream = bench.generate("math")
    del stream  # never iterated: its client has left
    await asyncio.wait_for(asyncio.gather(*context.coverages), 5)
    assert context.coverages[0].result() is None


@pytest.mark.parametrize(
    ("model", "error", "reason"),
    [
        ("nope", VLLMNotFoundError, "unknown_pool"),
        ("math+hot", VLLMValidationError, "bad_request"),
        ("emo", VLLMValidationError, "pool_too_large"),
        (None, VLLMValidationError, "pool_too_large"),
    ],
)
async def test_refusals_are_raised_before_anything_is_returned(
    bench: Bench, model: str | None, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error):
        bench.generate(model)
    assert bench.sample("refused_requests_total", reason=reason) == 1
    assert bench.script.calls == []


async def test_pooling_requests_are_refused(bench: Bench) -> None:
    with pytest.raises(VLLMValidationError, match="generates text"):
        bench.llm.encode("prompt", None, "id")


async def test_a_generator_that_is_dropped_unread_leaves_no_lease_behind(bench: Bench) -> None:
    stream = bench.generate("math")
    await settle()
    assert bench.running("math") == 1  # it is under way before it is read
    del stream
    await settle()
    assert bench.running("math") == 0
    assert bench.script.aborted == ["id"]
    assert bench.sample("requests_total", pool="math", outcome="aborted") == 1


async def test_the_lease_lasts_as_long_as_the_engine_works_not_as_the_client_reads(
    bench: Bench,
) -> None:
    stream = bench.generate("math")
    bench.script.feed(output("a", [1]))
    assert (await anext(stream)).outputs[0].text == "a"
    assert bench.running("math") == 1
    # the client stalls; the engine goes on and finishes
    bench.script.feed(output("b", [2]), output("c", [3]), output("d", [4], finished=True))
    await settle()
    assert bench.running("math") == 0
    # what was missed is one merged output: nothing is lost, and no more than that is kept
    (rest,) = await read(stream)
    assert (rest.outputs[0].text, rest.outputs[0].token_ids) == ("bcd", [2, 3, 4])
    assert rest.finished


async def test_a_client_that_leaves_aborts_its_request_and_gives_the_lease_back(
    bench: Bench,
) -> None:
    stream = bench.generate("math")
    bench.script.feed(output("a", [1]))
    await anext(stream)
    await stream.aclose()
    await settle()
    assert bench.script.aborted == ["id"]
    assert bench.running("math") == 0
    assert bench.sample("requests_total", pool="math", outcome="aborted") == 1


async def test_a_cancelled_reader_does_the_same(bench: Bench) -> None:
    reader = asyncio.create_task(read(bench.generate("math")))
    await settle()
    assert bench.running("math") == 1
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await settle()
    assert (bench.running("math"), bench.script.aborted) == (0, ["id"])


async def test_an_error_of_the_engine_reaches_the_reader(bench: Bench) -> None:
    bench.script.feed(output("a", [1]), RuntimeError("engine"))
    stream = bench.generate("math")
    with pytest.raises(RuntimeError, match="engine"):
        await read(stream)
    await settle()
    assert bench.running("math") == 0
    assert bench.sample("requests_total", pool="math", outcome="failed") == 1


GUIDED = SamplingParams(
    output_kind=RequestOutputKind.DELTA,
    structured_outputs=StructuredOutputsParams(grammar="root ::= root"),
)


def failed(tokens: list[int]) -> RequestOutput:
    made = output("", tokens, finished=True)
    made.outputs[0].finish_reason = "error"
    return made


@pytest.mark.parametrize("tokens", [[], [0]], ids=["not compiled", "no token may come first"])
async def test_a_grammar_that_nothing_can_follow_is_refused_before_a_stream_begins(
    bench: Bench, context: RequestContext, tokens: list[int]
) -> None:
    bench.script.feed(failed(tokens))
    stream = bench.generate("math", params=GUIDED)
    refused = await context.refusal()
    assert isinstance(refused, RequestError)
    with pytest.raises(VLLMValidationError, match="no output can follow") as error:
        await read(stream)
    assert error.value.parameter == "structured_outputs"
    await settle()
    assert bench.running("math") == 0
    assert bench.sample("refused_requests_total", reason="bad_request") == 1


async def test_a_stream_with_a_good_grammar_begins_with_its_first_output(
    bench: Bench, context: RequestContext
) -> None:
    stream = bench.generate("math", params=GUIDED)
    await settle()
    (admission,) = context.admissions
    assert not admission.done()
    bench.script.feed(output("a", [1]), failed([2]))
    assert await context.refusal() is None
    last = (await read(stream))[-1].outputs[0]
    assert (last.finish_reason, last.token_ids) == ("error", [1, 2])


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (VLLMValidationError("stop_token_ids", parameter="stop_token_ids"), RequestError),
        (GracefulHTTPError("the queue is full", HTTPStatus.SERVICE_UNAVAILABLE), Unavailable),
        (EngineDeadError(), EngineDead),
        (EngineGenerateError(), EmoServeError),
    ],
    ids=lambda each: getattr(each, "__name__", None) or type(each).__name__,
)
async def test_what_the_engine_does_not_take_is_refused_before_a_stream_begins(
    bench: Bench, context: RequestContext, error: Exception, wanted: type[EmoServeError]
) -> None:
    bench.script.refuses_with = error
    stream = bench.generate("math")
    refused = await context.refusal()
    assert type(refused) is wanted and str(error) in str(refused)
    with pytest.raises(type(error)):
        await read(stream)
    await settle()
    assert bench.running("math") == 0


async def test_without_a_grammar_a_failed_request_stays_the_engines_error(bench: Bench) -> None:
    bench.script.feed(failed([]))
    (only,) = await read(bench.generate("math"))
    assert only.outputs[0].finish_reason == "error"


@pytest.mark.parametrize(
    "cause", [OverflowError("too large"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")]
)
async def test_a_value_that_the_engine_cannot_be_sent_is_the_requests_error(
    bench: Bench, cause: Exception
) -> None:
    error = EngineGenerateError()
    error.__cause__ = cause
    bench.script.feed(error)
    with pytest.raises(VLLMValidationError, match="cannot be sent"):
        await read(bench.generate("math"))


async def test_any_other_failure_of_generate_stays_one(bench: Bench) -> None:
    error = EngineGenerateError()
    error.__cause__ = KeyError("a bug")
    bench.script.feed(error)
    with pytest.raises(EngineGenerateError):
        await read(bench.generate("math"))


async def test_a_union_is_published_once_and_read_in_its_own_row(
    bench: Bench, engine: FakeEngine
) -> None:
    before = len(engine.operations)
    for _ in range(2):
        bench.script.feed(output("a", [1], finished=True))
        await read(bench.generate("code+math"))
    assert len(engine.operations) == before + 1
    rows = {params.extra_args["emo_pool_row"] for _, params, _, _ in bench.script.calls}
    assert rows == {3}


async def test_a_union_that_cannot_be_published_is_the_requests_error(
    bench: Bench, engine: FakeEngine
) -> None:
    engine.failure = EngineDead("rank 0 failed")
    with pytest.raises(GracefulHTTPError, match="rank 0 failed") as error:
        await read(bench.generate("code+math"))
    assert error.value.http_status == 500
    assert bench.script.calls == []


async def test_a_request_whose_pool_must_be_loaded_waits_and_no_other_does(
    bench: Bench, engine: FakeEngine, context: RequestContext
) -> None:
    engine.is_holding = True
    law = bench.generate("law")
    load = await engine.next_held()
    bench.script.feed(output("a", [1], finished=True))
    assert (await read(bench.generate("code")))[-1].finished  # math went: asked for longer ago
    first, second = context.admissions
    assert (first.done(), second.result()) == (False, None)
    load.release()
    bench.script.feed(output("b", [1], finished=True))
    assert (await read(law))[-1].outputs[0].text == "b"
    assert first.result() is None


async def test_a_wait_that_is_too_long_is_told_to_the_gate_and_to_the_reader(
    bench: Bench, engine: FakeEngine, context: RequestContext
) -> None:
    engine.is_holding = True
    bench.service.manager._queue._deadline_seconds = 0.0  # rather than a minute of waiting
    stream = bench.generate("law")
    with pytest.raises(GracefulHTTPError, match="pool 'law' was not loaded within 0 s") as error:
        await read(stream)
    assert error.value.http_status == 503
    assert isinstance(await context.refusal(), LoadDeadlineExceeded)
    assert context.retry_after_seconds == 1
    assert bench.sample("refused_requests_total", reason="load_deadline") == 1


async def test_a_cut_ends_running_and_waiting_requests_with_the_error(
    bench: Bench, engine: FakeEngine, context: RequestContext
) -> None:
    running = bench.generate("math")
    bench.script.feed(output("a", [1]))
    await anext(running)
    engine.is_holding = True
    waiting = bench.generate("law")
    await settle()
    bench.llm.cut(Draining("stopped"))
    for stream in (running, waiting):
        with pytest.raises(GracefulHTTPError, match="stopped") as error:
            await read(stream)
        assert error.value.http_status == 503
    await settle()
    assert isinstance(await context.refusal(), Draining)
    assert bench.running("math") == 0
    assert not bench.llm._running


async def test_requests_and_tokens_are_counted_by_pool(bench: Bench) -> None:
    for model, kind, outputs in (
        ("math", RequestOutputKind.DELTA, [output("a", [1]), output("b", [2, 3], finished=True)]),
        ("math", RequestOutputKind.FINAL_ONLY, [output("ab", [1, 2], finished=True)]),
        ("code", RequestOutputKind.CUMULATIVE, [output("a", [1]), output("b", [1, 2, 3])]),
    ):
        bench.script.feed(*outputs, output("", [1, 2, 3], finished=True))
        stream = bench.generate(model, params=SamplingParams(output_kind=kind))
        await read(stream)
        while not bench.script.outputs.empty():
            bench.script.outputs.get_nowait()
    await settle()
    assert bench.sample("generation_tokens_total", pool="math") == 3 + 2
    assert bench.sample("generation_tokens_total", pool="code") == 3
    assert bench.sample("prompt_tokens_total", pool="math") == 2 * 3
    assert bench.sample("requests_total", pool="math", outcome="finished") == 2


async def test_a_size_has_its_own_row_and_salt_and_counts_under_its_pool(
    bench: Bench, context: RequestContext
) -> None:
    scores = tuple(float(-expert) for expert in range(8))
    layer = LayerExperts((0, 1, 2), scores)
    bench.service.catalog.add(ExpertPool("sums", (None, layer, layer)))
    bench.metrics.add_pool("sums")
    for model in ("sums@2", "sums@3", "emo:sums@4", "sums"):
        bench.script.feed(output("a", [1], finished=True))
        await read(bench.generate(model))
    await settle()
    assert context.pools == "sums@2, sums@3, sums@4, sums"
    salts = [prompt["cache_salt"] for prompt, *_ in bench.script.calls]
    assert salts[2] == salts[3], "sums lists as many experts: one content"
    assert len(set(salts)) == 3
    assert bench.sample("requests_total", pool="sums", outcome="finished") == 4
    assert bench.sample("request_experts_sum", pool="sums") == 2 + 3 + 4 + 4


async def test_many_requests_of_many_pools_leave_no_lease_behind(bench: Bench) -> None:
    for _ in range(24):
        bench.script.feed(output("a", [1], finished=True))
    models = ["math", "code", "math+code"] * 8
    await asyncio.gather(*(read(bench.generate(model)) for model in models))
    await settle()
    assert [bench.running(model) for model in ("math", "code", "math+code")] == [0, 0, 0]
    bench.service.manager.check_integrity()


# -- the bound on admitted work --


@pytest.fixture
async def bounded() -> Bench:
    """Two run at once and five more are admitted, four of them of one pool alone."""
    service = service_of(FakeEngine(), slots=6, rows=4, limits=BacklogLimits(2, 5))
    for name in ("math", "code"):
        await service.manager.load(service.lookup.find(name))
    bench = Bench(service, Script())
    bench.llm = bench.client(max_sequences=4)
    return bench


async def test_a_flood_is_refused_before_anything_is_returned_and_counted(bounded: Bench) -> None:
    streams = [bounded.generate("math") for _ in range(6)]
    with pytest.raises(GracefulHTTPError, match="too many requests are queued") as error:
        bounded.generate("math")
    assert error.value.http_status == 503
    assert bounded.sample("refused_requests_total", reason="too_many_queued") == 1
    first_of_another = bounded.generate("code")
    await settle()
    assert bounded.running("code") == 1
    del first_of_another, streams[0]  # never read; their places are given back
    await settle()
    streams.append(bounded.generate("math"))


@pytest.mark.parametrize("ending", ["finished", "failed", "left", "unread", "cancelled early"])
async def test_a_place_is_given_back_however_the_request_ends(bounded: Bench, ending: str) -> None:
    backlog = bounded.service.manager._backlog
    stream = bounded.generate("math", params=SamplingParams(n=3))
    assert backlog.num_admitted == 3
    if ending == "cancelled early":
        next(iter(bounded.llm._running)).cancel()
    elif ending == "unread":
        del stream
    elif ending == "failed":
        bounded.script.feed(RuntimeError("engine"))
        with pytest.raises(RuntimeError):
            await read(stream)
    else:
        bounded.script.feed(output("a", [1], finished=ending == "finished"))
        await anext(stream)
        await stream.aclose()
    await settle()
    assert backlog.num_admitted == 0


async def test_a_prompt_that_cannot_be_placed_takes_no_place(bounded: Bench) -> None:
    with pytest.raises(VLLMValidationError):
        bounded.generate("math", "text")
    assert bounded.service.manager._backlog.num_admitted == 0


async def test_n_is_bounded_by_the_engines_batch(bounded: Bench) -> None:
    with pytest.raises(VLLMValidationError, match="n is 5, .* at most 4 .*--max-num-seqs") as error:
        bounded.generate("math", params=SamplingParams(n=5))
    assert error.value.parameter == "n"
    assert bounded.sample("refused_requests_total", reason="bad_request") == 1
    bounded.generate("math", params=SamplingParams(n=4))


async def test_a_request_that_could_never_be_admitted_is_told_so(
    bounded: Bench, context: RequestContext
) -> None:
    streams = [bounded.generate("math") for _ in range(6)]  # prompts of one HTTP request
    with pytest.raises(VLLMValidationError, match="7 completions or more .* at most 6 .*--max-que"):
        bounded.generate("math")
    assert len(streams) == context.num_sequences == 6


async def test_the_next_step_of_an_admitted_request_is_not_refused(
    bounded: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beam search makes one engine request per beam and step."""
    mine, theirs = RequestContext(), RequestContext()
    target = "emo_serve.server.vllm_adapter.generation.current_request"
    monkeypatch.setattr(target, lambda: mine)
    bounded.script.feed(output("a", [1], finished=True))
    await read(bounded.generate("math"))
    await settle()
    monkeypatch.setattr(target, lambda: theirs)
    flood = [bounded.generate("math") for _ in range(6)]
    monkeypatch.setattr(target, lambda: mine)
    await settle()
    step = [bounded.generate("math") for _ in range(4)]
    with pytest.raises(GracefulHTTPError):
        bounded.generate("math")  # more than a batch of its own
    assert len(flood) + len(step) == bounded.service.manager._backlog.num_admitted
