"""Spans of a real server, as a collector gets them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.engine.server.conftest import hold_only
from tests.support.progress import wait_for
from tests.support.server_process import RunningServer
from tests.support.trace_collector import TraceCollector

pytestmark = [pytest.mark.vllm, pytest.mark.server("shipped")]


def test_a_span_says_pool_hit_wait_and_coverage(
    server: RunningServer, http: httpx.Client, collector: TraceCollector
) -> None:
    hold_only(http, "python")

    def of_pool(name: str) -> list[dict[str, Any]]:
        spans = [values for kind, values in collector.spans if kind == "llm_request"]
        return [values for values in spans if values.get("emo_serve.pool") == name]

    before = {name: len(of_pool(name)) for name in ("python@8", "math@8")}
    hold_only(http, "python@8")
    for name in before:
        body = {"model": name, "prompt": "def add(a, b):\n", "max_tokens": 4, "ignore_eos": True}
        http.post("/v1/completions", json=body).raise_for_status()
    wait_for(
        lambda: all(len(of_pool(name)) > count for name, count in before.items()), server.activity
    )
    hit, miss = of_pool("python@8")[-1], of_pool("math@8")[-1]
    assert (hit["emo_serve.pool_hit"], miss["emo_serve.pool_hit"]) == (True, False)
    assert 0 <= hit["emo_serve.wait_seconds"] < miss["emo_serve.wait_seconds"]
    for values in (hit, miss):
        assert 0 < values["emo_serve.coverage"] <= 1
        assert values["gen_ai.usage.completion_tokens"] == 4
