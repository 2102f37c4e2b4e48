"""vLLM's spans wait for what the front end knows of their request, and then carry it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.tracing import SpanAttributes, instrument_manual
from vllm.v1.engine import output_processor

from emo_serve.server.coverage import CoverageSum
from emo_serve.server.vllm_adapter.spans import RequestSpans, trace_requests
from tests.support.fake_engine import FakeEngine, settle
from tests.unit.server.vllm_adapter.test_generation import Bench, Script, output, read, service_of


class Written(list[dict[str, Any]]):
    def __call__(self, **span: Any) -> None:
        self.append(span)


def end(spans: RequestSpans, request_id: str, **more: Any) -> None:
    """End a request as vLLM does."""
    attributes = {SpanAttributes.GEN_AI_REQUEST_ID: request_id, **more}
    spans.hold("llm_request", 1, attributes=attributes, context="parent", kind=1)


def test_a_span_is_written_when_its_coverage_is_known() -> None:
    written = Written()
    spans = RequestSpans(written)
    spans.note("a", "math@8", is_hit=False, wait_seconds=1.5)
    end(spans, "a", n=2)
    end(spans, "a", n=2)  # the other of two completions
    assert written == []
    spans.settle("a", CoverageSum(3.0, 4))
    assert len(written) == 2
    span = written[0]
    assert (span["span_name"], span["start_time"], span["context"]) == ("llm_request", 1, "parent")
    assert span["end_time"] > 1e18  # when it was held, in ns
    assert span["attributes"] == {
        SpanAttributes.GEN_AI_REQUEST_ID: "a",
        "n": 2,
        "emo_serve.pool": "math@8",
        "emo_serve.pool_hit": False,
        "emo_serve.wait_seconds": 1.5,
        "emo_serve.coverage": 0.75,
    }
    spans.settle("a", None)  # nothing is left
    assert len(written) == 2


def test_an_unknown_coverage_and_an_unknown_request() -> None:
    written = Written()
    spans = RequestSpans(written)
    end(spans, "warm-up")
    assert [span["attributes"] for span in written] == [
        {SpanAttributes.GEN_AI_REQUEST_ID: "warm-up"}
    ]
    spans.note("b", "law", is_hit=True, wait_seconds=0.0)
    end(spans, "b")
    spans.settle("b", None)
    assert "emo_serve.coverage" not in written[1]["attributes"]
    spans.settle("never had its pool", None)
    assert len(written) == 2


async def test_a_request_notes_its_pool_before_the_engine_and_settles_after_it() -> None:
    written, script = Written(), Script()
    bench = Bench(service_of(FakeEngine(), slots=6, rows=4), script)
    spans = RequestSpans(written)
    bench.llm._spans = spans
    for coverage in (bench.coverage, None):
        bench.llm._coverage = coverage
        script.feed(output("a", [1], finished=True))
        stream = bench.generate("math")
        async for _ in stream:
            end(spans, "id")
        bench.sums = {1: CoverageSum(1.0, 2)}
        if coverage is not None:
            assert written == []
            await coverage._read_anew()
        await settle()
    first, second = (span["attributes"] for span in written)
    assert (first["emo_serve.pool"], first["emo_serve.pool_hit"]) == ("math", False)
    assert (first["emo_serve.coverage"], first["emo_serve.wait_seconds"] >= 0) == (0.5, True)
    assert (second["emo_serve.pool_hit"], "emo_serve.coverage" in second) == (True, False)
    assert spans._requests == {}


async def test_a_refused_request_leaves_nothing_behind() -> None:
    script = Script()
    bench = Bench(service_of(FakeEngine(), slots=6, rows=4), script)
    bench.llm._spans = spans = RequestSpans(Written())
    script.feed(RuntimeError("broken"))
    with pytest.raises(RuntimeError):
        await read(bench.generate("math"))
    await bench.coverage._read_anew()
    assert spans._requests == {}


def engine_with(endpoint: str | None) -> Any:
    return SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint))


def test_only_an_engine_that_writes_spans_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_processor, "instrument_manual", instrument_manual)
    assert trace_requests(engine_with(None)) is None
    assert output_processor.instrument_manual is instrument_manual
    spans = trace_requests(engine_with("http://collector:4317"))
    assert spans is not None
    assert output_processor.instrument_manual == spans.hold
