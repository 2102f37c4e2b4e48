"""The shipped model, a slab that holds one of its pools, an API key."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import httpx
import openai
import pytest

from emo_serve import demo
from tests.engine.server.conftest import API
from tests.support.server_process import RunningServer, error_of

pytestmark = [pytest.mark.vllm, pytest.mark.server("shipped")]


def ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    return client.completions.create(
        model=model, prompt="hello", max_tokens=8, temperature=0, **options
    )


def test_pools_are_resident_in_the_order_given_as_long_as_they_fit(
    server: RunningServer, http: httpx.Client
) -> None:
    cards = {card["name"]: card for card in http.get("/v1/pools").json()["data"]}
    resident = {name for name, card in cards.items() if card["resident"]}
    assert resident == {"python"}
    assert cards["python"]["default"]
    assert {"base", *demo.domains()} == set(cards)
    assert "emo-demo is ready" in server.summary
    assert "9 slots per layer and 4 to stream" in server.summary
    for name, size, state in (
        ("python", 8, r"resident  \(default\)"),
        ("math", 8, "loaded on request"),
        ("spanish", 8, "loaded on request"),
        ("base", 32, "streamed, slowly"),
    ):
        assert re.search(rf"{name} +{size} experts per layer  {state}\n", server.summary), name
    assert "pool math will be loaded on request" in server.log


@pytest.mark.parametrize("domain", ["python", "spanish", "html"])
def test_auto_knows_the_shipped_domains(client: openai.OpenAI, domain: str) -> None:
    answer = client.completions.create(
        model="auto", prompt=demo.heldout(domain)[0][:400], max_tokens=1
    )
    assert answer.model == domain


def test_the_models_name_means_the_default_pool(client: openai.OpenAI) -> None:
    answer = ask(client, "emo-demo")
    assert answer.model == "emo-demo"
    assert answer.choices[0].text == ask(client, "python").choices[0].text
    models = {model.id: model.model_extra or {} for model in client.models.list().data}
    assert models["emo-demo"]["default_pool"] == "python"


def cards(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {card["name"]: card for card in http.get("/v1/pools").json()["data"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["math", "c+html", "spanish"])
def test_asking_for_a_pool_that_is_not_resident_simply_works(
    client: openai.OpenAI, http: httpx.Client, model: str, stream: bool
) -> None:
    ask(client, "python")
    assert not cards(http).get(model, {"resident": False})["resident"]
    answer = ask(client, model, stream=stream)
    text = "".join(event.choices[0].text for event in answer) if stream else answer.choices[0].text
    assert text == ask(client, model).choices[0].text
    shown = http.get(f"/v1/pools/{model}").json()
    assert (shown["resident"], shown["state"]) == (True, "resident")
    assert not cards(http)["python"]["resident"]  # there is room for one


@pytest.mark.parametrize("model", ["base", "emo-demo:base", "python+math"])
def test_a_pool_the_slab_can_never_hold_is_streamed(
    client: openai.OpenAI, http: httpx.Client, model: str
) -> None:
    assert len(ask(client, model, logprobs=1).choices[0].logprobs.tokens) == 8
    name = model.removeprefix("emo-demo:")
    card = http.get(f"/v1/pools/{name}").json()
    assert (card["state"], card["resident"], card["pinned"]) == ("streamed", False, False)
    held = {name: card["resident"] for name, card in cards(http).items()}
    ask(client, model)
    assert {name: card["resident"] for name, card in cards(http).items()} == held
    assert 'emo_serve_pool_resident{pool="base"} 0.0' in http.get("/metrics").text


def test_a_pool_the_slab_can_never_hold_is_not_pinned(http: httpx.Client) -> None:
    refused = http.post("/v1/pools/base/pin")
    message = refused.json()["error"]["message"]
    assert refused.status_code == 400
    assert "GiB" in message
    assert "slots and has 9" in message
    assert "--expert-memory" in message


def test_pinned_pools_leave_the_others_a_503_that_names_them(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    assert http.post("/v1/pools/python/pin").json()["pinned"]
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as refusal:
            ask(client, "math", stream=stream)
        assert refusal.value.status_code == 503
        assert refusal.value.response.headers["retry-after"] == "1"
        assert "the pinned pools (python) leave too few slots" in error_of(refusal.value)["message"]
    assert ask(client, "python")
    assert not http.post("/v1/pools/python/unpin").json()["pinned"]
    assert ask(client, "math")


def test_the_shipped_model_writes_and_chats(client: openai.OpenAI) -> None:
    assert len(ask(client, "python", logprobs=1).choices[0].logprobs.tokens) == 8
    chat = client.chat.completions.create(
        model="emo-demo:python", messages=[{"role": "user", "content": "def f(x):"}], max_tokens=8
    )
    assert chat.choices[0].message.content


def test_the_key_guards_everything_but_what_monitors_ask(server: RunningServer) -> None:
    with server.http(key="") as no_key:
        for path in ("/v1/models", "/v1/pools", "/v1/pools/python", "/openapi.json"):
            assert no_key.get(path).status_code == 401, path
        for path in ("/v1/completions", "/v1/pools/python/evict", "/tokenize"):
            assert no_key.post(path, json={"prompt": "a"}).status_code == 401, path
        for path in ("/health", "/ready", "/metrics", "/metrics/routing"):
            assert no_key.get(path).status_code == 200, path


def test_the_curl_line_works_when_pasted(server: RunningServer) -> None:
    (line,) = [line for line in server.summary.splitlines() if line.startswith("  try ")]
    command = line.removeprefix("  try").strip()
    assert "$EMO_SERVE_API_KEY" in command
    assert API not in server.summary
    answer = subprocess.run(
        ["bash", "-c", command],
        env={"PATH": "/usr/bin:/bin", "EMO_SERVE_API_KEY": API},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"object":"text_completion"' in answer.stdout
