"""Coverage and usage of a real server: told beside answers, in metrics, and by pool."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.emo.routing import router_probabilities
from tests.support.golden.checkpoints import config_of, golden, pools_of
from tests.support.progress import wait_for
from tests.support.server_process import RunningServer, error_of
from tests.unit.cli.test_pools import run
from tests.unit.emo.test_model import masks

pytestmark = pytest.mark.vllm

WANTED = {"x-emo-coverage": "true"}
MESSAGES: Any = [{"role": "user", "content": "hello"}]
MOES = [moe for moe in EmoConfig(**config_of("shared1")).moe_layers if moe is not None]


@pytest.fixture(scope="module")
def reference(golden_checkpoint: Path) -> EmoForCausalLM:
    return load_model(golden_checkpoint)


def complete(client: openai.OpenAI, model: str, prompt: Any = "hello", **options: Any) -> Any:
    """Ask for one completion that finds nothing in the prefix cache; return the raw response."""
    body = {"cache_salt": uuid.uuid4().hex, **options.pop("extra_body", {})}
    options = {"max_tokens": 1, "temperature": 0, "extra_headers": WANTED, **options}
    return client.completions.with_raw_response.create(
        model=model, prompt=prompt, extra_body=body, **options
    )


def report_of(response: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(response.content)["emo_serve"]
    assert float(response.headers["x-emo-coverage"]) == report["coverage"]
    assert response.headers["x-emo-pool"] == report["pool"]
    return report


@torch.no_grad()
def share_inside(model: EmoForCausalLM, prompt: list[int], pool: list[list[int]]) -> float:
    """Return the mean over tokens and layers of the full router's mass inside the pool."""
    records: list[RouterRecord] = []
    model(torch.tensor([prompt]), pool=masks(pool, "shared1"), record=records)
    shares = []
    for record in records:
        moe = model.config.moe_layers[record.layer]
        assert moe is not None
        probabilities = router_probabilities(record.logits_BTE[0], moe)
        standard = range(moe.num_experts - moe.num_shared_experts)
        inside = [expert for expert in pool[record.layer] if expert in standard]
        shares.append(probabilities[:, inside].sum(-1).mean())
    return float(torch.stack(shares).mean())


# -- beside the answer --


@pytest.mark.parametrize("pool", ["math", "code", "law"])
def test_it_is_the_full_routers_mass_inside_the_pool(
    client: openai.OpenAI, reference: EmoForCausalLM, pool: str
) -> None:
    prompt = golden().prompts[0]
    report = report_of(complete(client, pool, prompt))
    assert (report["pool"], report["routed_tokens"]) == (pool, len(prompt))
    expected = share_inside(reference, prompt, pools_of("shared1")[pool])
    assert report["coverage"] == pytest.approx(expected, abs=2e-4)
    assert 0.1 < expected < 0.9


@pytest.mark.parametrize(
    ("model", "pool"), [("emo", "base"), ("emo:math", "math"), ("math+code", "code+math")]
)
def test_the_base_pool_covers_all_and_names_are_the_canonical_ones(
    client: openai.OpenAI, model: str, pool: str
) -> None:
    report = report_of(complete(client, model))
    assert report["pool"] == pool
    assert (report["coverage"] == 1.0) == (pool == "base")


def test_generated_tokens_count_but_for_the_last_which_is_not_routed(client: openai.OpenAI) -> None:
    options: Any = {"max_tokens": 6, "extra_body": {"ignore_eos": True}}
    assert report_of(complete(client, "math", [1] * 10, **options))["routed_tokens"] == 15
    several = complete(client, "math", [[1] * 10, [2] * 20], **options)
    assert report_of(several)["routed_tokens"] == 15 + 25


def test_who_does_not_ask_is_told_the_pool_alone(client: openai.OpenAI, http: httpx.Client) -> None:
    for headers in ({}, {"x-emo-coverage": "0"}):
        response = complete(client, "emo", extra_headers={"x-emo-pool": "math", **headers})
        assert response.headers["x-emo-pool"] == "math"
        assert "x-emo-coverage" not in response.headers
        assert "emo_serve" not in json.loads(response.content)
    for answer in (
        http.get("/v1/models", headers=WANTED),
        http.post("/tokenize", json={"model": "math", "prompt": "hello"}, headers=WANTED),
        http.post("/v1/completions", json={"model": "nope", "prompt": "x"}, headers=WANTED),
    ):
        assert "x-emo-pool" not in answer.headers
        assert "emo_serve" not in answer.json()


def test_a_wish_that_cannot_be_read_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, "math", extra_headers={"x-emo-coverage": "yes"})
    assert "x-emo-coverage is 'yes'" in error_of(raised.value)["message"]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_has_one_more_chunk_without_choices(client: openai.OpenAI, kind: str) -> None:
    options: Any = {"model": "math", "max_tokens": 6, "temperature": 0, "stream": True}
    options |= {"extra_headers": WANTED, "stream_options": {"include_usage": True}}
    if kind == "chat":
        chunks: list[Any] = list(client.chat.completions.create(messages=MESSAGES, **options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        whole: Any = client.chat.completions.create(
            model="math", messages=MESSAGES, max_tokens=6, temperature=0
        )
        assert text == whole.choices[0].message.content
    else:
        chunks = list(client.completions.create(prompt="hello", **options))
    *others, last = chunks
    report = last.model_extra["emo_serve"]
    assert last.choices == []
    assert (last.id, last.object, last.model) == (others[0].id, others[0].object, "math")
    assert others[-1].usage is not None
    assert (report["pool"], 0 < report["coverage"] < 1) == ("math", True)
    assert report["routed_tokens"] > 0
    assert not any("emo_serve" in (chunk.model_extra or {}) for chunk in others)


def test_responses_and_messages_tell_in_whole_answers_and_at_the_end_of_streams(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    body: dict[str, Any] = {"model": "math", "max_tokens": 4, "messages": MESSAGES}
    message = http.post("/v1/messages", json=body, headers=WANTED)
    assert report_of(message)["pool"] == "math"
    asked: Any = {"model": "math", "input": "hello", "max_output_tokens": 16}
    response = client.responses.with_raw_response.create(**asked, extra_headers=WANTED)
    assert report_of(response)["pool"] == "math"
    events = list(client.responses.create(**asked, stream=True, extra_headers=WANTED))
    assert events[-1].type == "response.completed"
    assert events[-1].response.model_extra["emo_serve"]["pool"] == "math"
    stream = http.post("/v1/messages", json=body | {"stream": True}, headers=WANTED)
    assert stream.headers["x-emo-pool"] == "math"
    kind, data = stream.text.strip().split("\n\n")[-1].split("\n")
    assert kind == "event: message_stop"
    told = json.loads(data.removeprefix("data: "))["emo_serve"]
    assert told["pool"] == "math" and 0 < told["coverage"] < 1
    assert stream.text.count("emo_serve") == 1


def test_beam_search_adds_up_its_many_engine_requests(client: openai.OpenAI) -> None:
    body = {"use_beam_search": True, "ignore_eos": True}
    response = complete(client, "law", [3] * 10, n=2, max_tokens=4, extra_body=body)
    report = report_of(response)
    assert report["pool"] == "law"
    assert report["routed_tokens"] >= 10


# -- metrics --


def observed(http: httpx.Client, pool: str) -> tuple[float, float]:
    """Return how many requests a pool's histogram has, and their coverage added up."""
    found = {}
    for line in http.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        found[name] = value
    label = f'{{pool="{pool}"}}'
    count, total = (found[f"emo_serve_request_coverage_{what}{label}"] for what in ("count", "sum"))
    return float(count), float(total)


def test_the_histogram_has_each_engine_request_once_asked_for_or_not(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    wait_for_quiet(http, "tiny")
    count, total = observed(http, "tiny")
    told = [report_of(complete(client, "tiny", "abc"))["coverage"] for _ in range(2)]
    complete(client, "tiny", ["abc", "abc"], extra_headers={})
    wait_for(lambda: observed(http, "tiny")[0] >= count + 4)
    wait_for_quiet(http, "tiny")
    now, sum_now = observed(http, "tiny")
    assert now == count + 4
    assert sum_now - total == pytest.approx(4 * told[0], abs=1e-3)
    assert told[0] == told[1]


def wait_for_quiet(http: httpx.Client, pool: str) -> None:
    """Wait until nothing of the pool is under way and another read has come and gone."""
    wait_for(lambda: http.get(f"/v1/pools/{pool}").json()["running_requests"] == 0)
    with_one_more = observed(http, "law")[0] + 1
    http.post("/v1/completions", json={"model": "law", "prompt": "x", "max_tokens": 1})
    wait_for(lambda: observed(http, "law")[0] >= with_one_more)


# -- usage --


def complete_pool(name: str) -> list[list[int]]:
    """Return a pool's experts with the shared ones."""
    kept = zip(MOES, pools_of("shared1")[name], strict=True)
    return [sorted({*ids, *moe.implied}) for moe, ids in kept]


def usage_of(http: httpx.Client, pool: str) -> dict[str, Any]:
    answer = http.get(f"/v1/pools/{pool}/usage")
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()
    return usage


def test_usage_counts_what_each_token_took(client: openai.OpenAI, http: httpx.Client) -> None:
    before = usage_of(http, "code")
    complete(client, "code", golden().prompts[1])
    after = usage_of(http, "code")
    tokens = after["tokens"] - before["tokens"]
    assert tokens == len(golden().prompts[1])
    for moe, old, new in zip(MOES, before["layers"], after["layers"], strict=True):
        taken = [b - a for a, b in zip(old["counts"], new["counts"], strict=True)]
        assert new["num_experts"] == moe.num_experts
        assert taken[-1] == tokens  # the shared one
        assert sum(taken) == tokens * min(moe.top_k, len(taken))
    assert [layer["experts"] for layer in after["layers"]] == complete_pool("code")


def test_a_union_and_a_pool_without_requests_have_their_own_accounts(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    before = [usage_of(http, name)["tokens"] for name in ("law", "tiny")]
    complete(client, "law+tiny")
    assert usage_of(http, "tiny+law")["tokens"] >= 5
    assert [usage_of(http, name)["tokens"] for name in ("law", "tiny")] == before
    layers = [{"experts": [1, 2, 3, 4, 5]}] * 3
    document = {"format": "emo-pool/1", "name": "unasked", "layers": layers}
    try:
        assert http.post("/v1/pools", json=document).status_code == 201
        usage = usage_of(http, "unasked")
    finally:
        http.delete("/v1/pools/unasked")
    assert usage["tokens"] == 0
    assert [layer["counts"] for layer in usage["layers"]] == [[0] * 6] * 3


def test_the_terminal_draws_it(
    server: RunningServer, client: openai.OpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(client, "math", golden().prompts[0])
    assert run("usage", "math", "--server", server.url) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if line.startswith("layer ")]
    for line, ids in zip(drawn, complete_pool("math"), strict=True):
        marks = line.split()[2]
        assert [place for place, mark in enumerate(marks) if mark != "."] == ids
        assert marks[-1] == "#"
