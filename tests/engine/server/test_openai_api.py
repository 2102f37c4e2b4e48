"""The OpenAI API of a real server, through the `openai` client: one pool per request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM
from tests.engine.server.conftest import POOLS
from tests.support.golden.checkpoints import golden, pools_of
from tests.support.server_process import RunningServer
from tests.unit.emo.test_model import logprobs, masks

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3  # nats per token
MESSAGES: Any = [{"role": "user", "content": "hello"}]


def greedy(client: openai.OpenAI, model: str, prompt: Any = "hello", **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, **options)


def prompt_logprobs(answer: Any, prompt: list[int]) -> list[float]:
    entries = answer.choices[0].model_extra["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, prompt[1:], strict=True)]


# -- which experts compute --


async def test_golden_log_probabilities_with_all_pools_in_one_batch(server: RunningServer) -> None:
    names = {"emo": "full", "math": "math", "emo:code": "code", "law": "law"}
    async with server.async_client() as client:

        async def ask(model: str, prompt: list[int]) -> list[float]:
            answer = await client.completions.create(
                model=model, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 0}
            )
            return prompt_logprobs(answer, prompt)

        asked = [(model, row) for row in range(3) for model in names]
        answers = await asyncio.gather(*(ask(m, golden().prompts[row]) for m, row in asked))
    for (model, row), answer in zip(asked, answers, strict=True):
        expected = golden().prompt_logprobs[names[model]][row]
        worst = max(abs(a - b) for a, b in zip(answer, expected, strict=True))
        assert worst < TOLERANCE, (model, row, worst)


@pytest.fixture(scope="module")
def reference(golden_checkpoint: Path) -> EmoForCausalLM:
    return load_model(golden_checkpoint)


@pytest.mark.parametrize("model", ["math+code", "emo:code+math", "tiny+law+math", "math+math"])
def test_a_union_computes_with_the_experts_of_all_its_pools(
    client: openai.OpenAI, reference: EmoForCausalLM, model: str
) -> None:
    parts = model.removeprefix("emo:").split("+")
    pools = pools_of("shared1")
    united = [sorted({e for part in parts for e in pools[part][layer]}) for layer in range(3)]
    prompt = golden().prompts[0]
    expected = logprobs(reference, [prompt], pool=masks(united, "shared1"))[0]
    answer = greedy(client, model, prompt, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert answer.model == model
    torch.testing.assert_close(
        torch.tensor(prompt_logprobs(answer, prompt)), expected, atol=TOLERANCE, rtol=0
    )


async def test_concurrent_requests_of_four_pools_answer_as_if_alone(
    server: RunningServer,
) -> None:
    asked = [(POOLS[i % 4], f"question {i // 4}") for i in range(32)]
    async with server.async_client() as client:

        async def ask(model: str, prompt: str) -> str:
            answer = await client.completions.create(
                model=model, prompt=prompt, max_tokens=24, temperature=0
            )
            return answer.choices[0].text

        alone = [await ask(*request) for request in asked]
        together = await asyncio.gather(*(ask(*request) for request in asked))
    assert together == alone
    assert len(set(alone)) > len(alone) / 2


def test_a_client_cannot_choose_a_pool_through_extra_args(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    prompt = golden().prompts[1]
    row = http.get("/v1/pools/code").json()["row"]
    body = {"prompt_logprobs": 0, "vllm_xargs": {"emo_pool_row": row}}
    answer = greedy(client, "math", prompt, max_tokens=1, extra_body=body)
    expected = golden().prompt_logprobs["math"][1]
    worst = max(abs(a - b) for a, b in zip(prompt_logprobs(answer, prompt), expected, strict=True))
    assert worst < TOLERANCE


# -- names --


@pytest.mark.parametrize("model", ["emo", "math", "emo:math", "math+code", "emo:code+math", "base"])
def test_the_answer_has_the_name_the_client_wrote(client: openai.OpenAI, model: str) -> None:
    assert greedy(client, model, max_tokens=1).model == model
    chat = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1)
    assert chat.model == model
    stream = greedy(client, model, max_tokens=2, stream=True)
    assert {chunk.model for chunk in stream} == {model}


def test_the_header_names_the_pool_beside_the_models_name(client: openai.OpenAI) -> None:
    by_header = greedy(client, "emo", extra_headers={"x-emo-pool": "math"})
    assert by_header.choices[0].text == greedy(client, "math").choices[0].text
    assert by_header.model == "emo"
    assert by_header.choices[0].text != greedy(client, "emo").choices[0].text


def test_a_message_type_is_no_pools_name(client: openai.OpenAI) -> None:
    """vLLM chooses an adapter that is called like the type of a message's part."""
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    answer = client.chat.completions.create(model="emo", messages=parts, max_tokens=1)
    assert answer.model == "emo"


def test_models_lists_the_model_and_every_pool_but_no_union(client: openai.OpenAI) -> None:
    greedy(client, "math+code", max_tokens=1)
    models = {model.id: model.model_extra or {} for model in client.models.list().data}
    assert list(models) == ["emo", "auto", "code", "law", "math", "tiny"]
    assert models["emo"]["parent"] is None
    assert models["emo"]["default_pool"] == "base"
    assert {models[name]["parent"] for name in ("auto", *POOLS)} == {"emo"}
    assert {model["max_model_len"] for model in models.values()} == {512}


# -- what the protocol offers --


def test_completions_stream_the_same_text(client: openai.OpenAI) -> None:
    whole = greedy(client, "math", logprobs=2)
    chunks = list(greedy(client, "math", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert len(whole.choices[0].logprobs.token_logprobs) == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.top_logprobs) == whole.usage.completion_tokens


def test_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    options: Any = {"model": "code", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].logprobs.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3


def test_stop_ends_the_text(client: openai.OpenAI) -> None:
    text = greedy(client, "law", max_tokens=24).choices[0].text
    stop = text[len(text) // 2]
    stopped = greedy(client, "law", max_tokens=24, stop=[stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        answer = greedy(client, "math+code", temperature=1.0, seed=seed, max_tokens=16)
        return str(answer.choices[0].text)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_n_gives_n_choices_streaming_or_not(client: openai.OpenAI) -> None:
    answer = greedy(client, "math", n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    chunks = greedy(client, "math", n=3, temperature=1.0, seed=5, stream=True)
    assert {c.choices[0].index for c in chunks if c.choices} == {0, 1, 2}


def test_several_prompts_in_one_request(client: openai.OpenAI) -> None:
    alone = [greedy(client, "code", prompt).choices[0].text for prompt in ("one", "two")]
    together = greedy(client, "code", ["one", "two"])
    assert [choice.text for choice in together.choices] == alone


def test_beam_search_stays_in_its_pool(client: openai.OpenAI) -> None:
    body = {"use_beam_search": True, "ignore_eos": True}
    beams = {
        model: greedy(client, model, n=2, max_tokens=6, extra_body=body).choices
        for model in ("math", "law", "math+code")
    }
    assert all(len(choices) == 2 for choices in beams.values())
    assert len({choices[0].text for choices in beams.values()}) > 1
    width_one = greedy(client, "math", n=1, max_tokens=6, extra_body=body)
    plain = greedy(client, "math", max_tokens=6, extra_body={"ignore_eos": True})
    assert width_one.choices[0].text == plain.choices[0].text


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": [1, 2]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="math",
        messages=MESSAGES,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["answer"] in (1, 2)


def test_tools(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"digit": {"enum": [7]}},
        "required": ["digit"],
        "additionalProperties": False,
    }
    function: Any = {"name": "press", "parameters": parameters, "strict": True}
    answer = client.chat.completions.create(
        model="math",
        messages=MESSAGES,
        max_tokens=256,
        temperature=0,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "press"}},
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "press"
    assert json.loads(call.function.arguments) == {"digit": 7}


def test_responses_and_messages_pass_the_same_step(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    response = client.responses.create(
        model="math", input="hello", max_output_tokens=16, temperature=0
    )
    chat = client.chat.completions.create(
        model="math", messages=MESSAGES, max_tokens=16, temperature=0
    )
    assert response.model == "math"
    assert response.output_text == chat.choices[0].message.content
    body = {"model": "code", "max_tokens": 4, "messages": MESSAGES}
    message = http.post("/v1/messages", json=body).json()
    assert message["model"] == "code"
    assert http.post("/v1/messages", json=body | {"model": "nope"}).status_code == 404


def test_tokenize_knows_pools(http: httpx.Client) -> None:
    body = {"model": "math", "prompt": "hello"}
    assert http.post("/tokenize", json=body).json()["count"] == 5
    assert http.post("/tokenize", json=body | {"model": "nope"}).status_code == 404


# -- prefix cache --


def cached_tokens(client: openai.OpenAI, model: str, prompt: str, **body: Any) -> int:
    answer = greedy(client, model, prompt, max_tokens=1, extra_body=body)
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_pools_share_no_prefix(client: openai.OpenAI) -> None:
    prompt = "x" * 300
    for model in ("math", "code", "emo", "math+code"):
        assert cached_tokens(client, model, prompt) == 0
        assert cached_tokens(client, model, prompt) >= 256
    assert cached_tokens(client, "emo:math", prompt) >= 256  # a pool by any of its names
    assert cached_tokens(client, "code+math", prompt) >= 256


def test_a_clients_salt_is_kept_inside_the_pools(client: openai.OpenAI) -> None:
    prompt = "y" * 300
    for salt in ("one", "two"):
        assert cached_tokens(client, "math", prompt, cache_salt=salt) == 0
        assert cached_tokens(client, "math", prompt, cache_salt=salt) >= 256
    assert cached_tokens(client, "code", prompt, cache_salt="one") == 0
