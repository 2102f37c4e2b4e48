"""Refusals, leases and accounts of a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.server.conftest import POOLS
from tests.support.progress import wait_for
from tests.support.server_process import (
    RawRequest,
    RunningServer,
    error_of,
    stopped_engine,
)

pytestmark = pytest.mark.vllm

MESSAGES: Any = [{"role": "user", "content": "hello"}]


def running(http: httpx.Client, pool: str) -> int:
    return int(http.get(f"/v1/pools/{pool}").json()["running_requests"])


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    for line in http.get("/metrics").text.splitlines():
        found, _, value = line.rpartition(" ")
        if found.partition("{")[0] == name and all(
            f'{k}="{v}"' in found for k, v in labels.items()
        ):
            return float(value)
    raise AssertionError(f"no metric {name} {labels}")


def engine_is_idle(http: httpx.Client) -> bool:
    """Ask vLLM's gauge, after a short request: it moves only when the engine answers something."""
    http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
    return metric(http, "vllm:num_requests_running") == 0


# -- refusals --


@pytest.mark.parametrize(
    ("model", "header", "status", "message"),
    [
        ("gpt-4", None, 404, "code, law, math, tiny"),
        ("emo:nope", None, 404, "there is no pool 'nope'"),
        ("math+nope", None, 404, "there is no pool 'nope'"),
        ("emo", "nope", 404, "there is no pool 'nope'"),
        ("broken", None, 404, "there is no pool 'broken'"),
        ("math", "code", 400, "different pools"),
        ("emo", "Not A Pool", 400, "x-emo-pool is 'Not A Pool'"),
        ("emo", "", 400, "x-emo-pool is ''"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_name_is_a_status_even_when_streaming(
    client: openai.OpenAI, model: str, header: str | None, status: int, message: str, stream: bool
) -> None:
    headers = {} if header is None else {"x-emo-pool": header}
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=1, stream=stream, extra_headers=headers
        )
    assert refusal.value.status_code == status
    assert message in error_of(refusal.value)["message"]


def test_completions_refuse_in_the_same_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="nope", prompt="hello")
    assert error_of(refusal.value)["type"] == "NotFoundError"


def test_an_unknown_pool_of_the_listing_is_a_404(http: httpx.Client) -> None:
    answer = http.get("/v1/pools/nope")
    assert answer.status_code == 404
    assert "there is no pool 'nope'" in answer.json()["error"]["message"]


# -- leases --


@pytest.fixture
def quiet(http: httpx.Client) -> Iterator[None]:
    yield
    wait_for(lambda: all(running(http, pool) == 0 for pool in POOLS))
    wait_for(lambda: engine_is_idle(http))


@pytest.mark.parametrize(("stream", "events"), [(True, 3), (True, 0), (False, 0)])
def test_a_client_that_leaves_gives_its_leases_back(
    server: RunningServer, http: httpx.Client, quiet: None, stream: bool, events: int
) -> None:
    before = metric(http, "emo_serve_requests_total", pool="math", outcome="aborted")
    with ExitStack() as stack:
        if not events:
            stack.enter_context(stopped_engine(server))
        # log-probabilities: the requests go on for long after the third event
        body = {"model": "math", "prompt": ["a"] * 24, "stream": stream, "logprobs": 20}
        with RawRequest(server, **body) as request:
            request.read_events(events)
            if events:
                stack.enter_context(stopped_engine(server))
            wait_for(lambda: running(http, "math") == 24)
        wait_for(lambda: running(http, "math") == 0)
    after = metric(http, "emo_serve_requests_total", pool="math", outcome="aborted")
    assert after - before == 24


def test_a_client_that_stops_reading_does_not_hold_the_pool(
    server: RunningServer, http: httpx.Client, quiet: None
) -> None:
    """Megabytes of log-probabilities fill every buffer on the way long before the text ends."""

    def finished() -> float:
        return metric(http, "emo_serve_requests_total", pool="law", outcome="finished")

    before = finished()
    with RawRequest(server, model="law", prompt=["a"] * 24, logprobs=20) as request:
        request.read_events(1)
        wait_for(lambda: finished() - before == 24)
        assert running(http, "law") == 0
        request.read_to_end()  # the client comes back and misses nothing
        assert request.received.count(b'"finish_reason":"length"') == 24
        assert b"data: [DONE]" in request.received


def test_running_requests_are_shown_while_they_run(
    server: RunningServer, client: openai.OpenAI, http: httpx.Client, quiet: None
) -> None:
    # a union's row is published by the engine
    client.completions.create(model="math+law", prompt="a", max_tokens=1)
    with stopped_engine(server), ExitStack() as stack:
        stack.enter_context(RawRequest(server, model="math+law", prompt=["a"] * 2))
        stack.enter_context(RawRequest(server, model="math", prompt=["a"] * 20))
        stack.enter_context(RawRequest(server, model="code", prompt=["a"] * 3))
        counts = {"math": 20, "code": 3, "math+law": 2}
        wait_for(lambda: {pool: running(http, pool) for pool in counts} == counts)
        assert running(http, "law") == 0
        assert metric(http, "emo_serve_running_requests", pool="math") == 20
        assert metric(http, "emo_serve_running_requests", pool="(union)") == 2


# -- accounts --


def test_pools_are_listed_with_size_row_and_state(http: httpx.Client) -> None:
    answer = http.get("/v1/pools").json()
    # unions are listed while they are in use; other tests' may be
    cards = {card["name"]: card for card in answer["data"] if card["kind"] != "union"}
    assert list(cards) == ["base", "code", "law", "math", "tiny"]
    assert all(card["resident"] for card in cards.values())
    assert (cards["base"]["row"], cards["base"]["default"]) == (0, True)
    assert cards["base"]["experts_per_layer"] == [32, 32, 32]
    assert cards["law"]["experts_per_layer"] == [16, 16, 16]
    assert cards["law"]["bytes"] == 3 * 16 * 3 * 128 * 64 * 4
    assert cards["law"]["description"] == "golden law"
    assert len({card["content_hash"] for card in cards.values()}) == 5
    slot_bytes = 3 * 128 * 64 * 4
    assert answer["slots"] == {
        **{"total": 96, "used": 96, "free": 0, "leased": 0},
        **{"bytes_per_slot": slot_bytes, "used_bytes": 96 * slot_bytes},
    }
    (refused,) = answer["refused"]
    assert "broken.json" in refused


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json() == {"ready": True}


def test_an_engine_that_makes_no_progress_is_not_ready(
    http: httpx.Client, server: RunningServer
) -> None:
    with stopped_engine(server):
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert "is stopped; continue it" in answer.json()["reason"]
        assert metric(http, "emo_serve_step_age_seconds") == 0  # it has no work
        request = RawRequest(server, model="math", prompt="hello", max_tokens=3)
        wait_for(lambda: metric(http, "emo_serve_step_age_seconds") > 0.5)
    wait_for(lambda: http.get("/ready").status_code == 200)
    with request:
        request.read_to_end()
        assert b"[DONE]" in request.received
    wait_for(lambda: metric(http, "emo_serve_step_age_seconds") == 0)
    assert metric(http, "emo_serve_event_loop_lag_seconds_count") > 0


def test_metrics_count_requests_and_tokens_by_pool(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    names = {
        "emo_serve_requests_total": {"outcome": "finished"},
        "emo_serve_prompt_tokens_total": {},
        "emo_serve_generation_tokens_total": {},
    }
    before = {name: metric(http, name, pool="tiny", **labels) for name, labels in names.items()}
    client.completions.create(
        model="tiny", prompt="hello", max_tokens=7, extra_body={"ignore_eos": True}
    )
    after = {name: metric(http, name, pool="tiny", **labels) for name, labels in names.items()}
    assert [after[name] - before[name] for name in names] == [1, 5, 7]
    for pool in ("base", *POOLS):
        assert metric(http, "emo_serve_pool_resident", pool=pool) == 1
    assert metric(http, "emo_serve_slots") == metric(http, "emo_serve_slots_in_use") == 96
    assert "vllm:prompt_tokens_total" in http.get("/metrics").text


def test_routers_read_which_pools_are_resident_and_how_busy_the_server_is(
    http: httpx.Client,
) -> None:
    text = http.get("/metrics/routing").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {
        "vllm:lora_requests_info",
        "vllm:cache_config_info",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits",
        "vllm:prefix_cache_queries",
    }
    (sample,) = families["vllm:lora_requests_info"].samples
    names = sample.labels["running_lora_adapters"].split(",")
    assert {"base", *POOLS} <= set(names)
    assert sample.labels["waiting_lora_adapters"] == ""
    assert int(sample.labels["max_lora"]) >= len(names)
    assert abs(sample.value - time.time()) < 60


def test_refusals_are_counted_by_reason(client: openai.OpenAI, http: httpx.Client) -> None:
    before = metric(http, "emo_serve_refused_requests_total", reason="unknown_pool")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nope", prompt="hello")
    assert metric(http, "emo_serve_refused_requests_total", reason="unknown_pool") == before + 1


def test_the_summary_tells_what_was_started(server: RunningServer, golden_pools: Any) -> None:
    summary = server.summary
    assert "emo is ready (float32" in summary
    assert "32 slots per layer" in summary
    assert "32 x 3 MoE layers" in summary
    assert str(golden_pools) in summary
    assert "refused: " in summary
    assert f"{server.url}/v1" in summary
    assert "16 experts per layer  resident" in summary


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/tokenize", {"prompt": "word " * 200_000}, "has 1000000 characters"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "word " * 1_000}] * 200},
            "characters",
        ),
        ("/detokenize", {"tokens": [5] * 100_000}, "100000 tokens"),
        (
            "/generative_scoring",
            {"query": "word " * 200_000, "items": ["a"], "label_token_ids": [5]},
            "has 1000000 characters",
        ),
        (
            "/generative_scoring",
            {"query": "a", "items": ["a"] * 5_000, "label_token_ids": [5]},
            "5000 items",
        ),
        ("/v1/completions", {"prompt": "a", "bad_words": ["word " * 9_000]}, "45000 characters"),
    ],
)
def test_what_would_take_long_to_tokenize_is_refused(
    http: httpx.Client, path: str, fields: dict[str, Any], message: str
) -> None:
    answer = http.post(path, json={"model": "math", **fields})
    assert answer.status_code == 400, answer.text[:500]
    assert message in answer.json()["error"]["message"]
