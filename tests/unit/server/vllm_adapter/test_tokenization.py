"""What one request may make the server tokenize, and that long texts hold up no short ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.renderers.params import TokenizeParams
from vllm.renderers.registry import renderer_from_config
from vllm.sampling_params import SamplingParams

from emo_serve import demo
from emo_serve.server.asgi.context import RequestContext, entered
from emo_serve.server.vllm_adapter.flags import parse_serve_args
from emo_serve.server.vllm_adapter.tokenization import (
    BoundedTokenization,
    check_bad_words,
    longest_text,
)

COUNTED = TokenizeParams(max_total_tokens=None)  # as of /tokenize


@pytest.fixture
def renderer() -> Iterator[Any]:
    args = parse_serve_args([str(demo.model_dir()), "--enforce-eager"], {})
    args.model = args.model_tag
    renderer = renderer_from_config(AsyncEngineArgs.from_cli_args(args).create_engine_config())
    yield renderer
    renderer.shutdown()


async def ids_of(renderer: Any, text: str, params: TokenizeParams = COUNTED) -> list[int]:
    (prompt,) = await renderer.tokenize_prompts_async([{"prompt": text}], params)
    return list(prompt["prompt_token_ids"])


async def test_a_text_that_could_never_fit_is_refused_before_it_is_tokenized(renderer: Any) -> None:
    BoundedTokenization(renderer, None).install(None)
    limit = longest_text(renderer)
    assert limit == 1024 * renderer.tokenizer.max_chars_per_token
    assert await ids_of(renderer, "a" * limit)
    renderer._tokenize_prompt = None  # whatever tokenizes now fails
    with pytest.raises(VLLMValidationError, match=f"has {limit + 1} characters.* at most {limit};"):
        await ids_of(renderer, "a" * (limit + 1))


@pytest.mark.parametrize("side", [None, "left", "right"])
async def test_a_text_to_be_truncated_gives_the_same_tokens_as_without_the_bound(
    renderer: Any, side: Any
) -> None:
    text = " ".join(map(str, range(longest_text(renderer) // 4)))
    params = TokenizeParams(max_total_tokens=1024, truncate_prompt_tokens=100, truncation_side=side)
    expected = await ids_of(renderer, text, params)
    BoundedTokenization(renderer, None).install(None)
    assert len(text) > longest_text(renderer) and len(expected) == 100
    assert await ids_of(renderer, text, params) == expected


@pytest.mark.parametrize("what", ["one long text", "many short texts", "tokens"])
async def test_a_request_with_much_text_holds_up_no_other(renderer: Any, what: str) -> None:
    BoundedTokenization(renderer, None).install(None)
    may_go_on, has_begun = threading.Event(), asyncio.Event()
    loop, tokenize, decode = asyncio.get_running_loop(), renderer._tokenize_prompt, renderer._decode

    def hold() -> None:
        if threading.current_thread().name.startswith("long-text"):
            loop.call_soon_threadsafe(has_begun.set)
            assert may_go_on.wait(60)

    renderer._tokenize_prompt = lambda *args: (hold(), tokenize(*args))[1]
    renderer._decode = lambda *args: (hold(), decode(*args))[1]

    async def much() -> object:
        with entered(RequestContext()):
            if what == "tokens":
                context = RequestContext()
                context.text_size = 40_000
                with entered(context):
                    prompt = TokensPrompt(prompt_token_ids=[5] * 1024)
                    wanted = TokenizeParams(max_total_tokens=None, needs_detokenization=True)
                    return await renderer.tokenize_prompt_async(prompt, wanted)
            if what == "one long text":
                renderer.model_config.max_model_len = 2048
                BoundedTokenization(renderer, None).install(None)
                return await ids_of(renderer, "word " * 8_000)
            texts = [{"prompt": "word " * 1_000} for _ in range(10)]
            return await renderer.tokenize_prompts_async(texts, COUNTED)

    long = asyncio.create_task(much())
    async with asyncio.timeout(60):
        await has_begun.wait()
        with entered(RequestContext()):
            assert await ids_of(renderer, "short")  # while the long one is held
        assert not long.done()
        may_go_on.set()
        assert await long


async def test_tokens_and_prompts_are_bounded(renderer: Any) -> None:
    BoundedTokenization(renderer, 3).install(None)
    prompt = TokensPrompt(prompt_token_ids=[5] * 1025)
    wanted = TokenizeParams(max_total_tokens=None, needs_detokenization=True)
    with pytest.raises(VLLMValidationError, match="1025 tokens; the limit is .* 1024"):
        await renderer.tokenize_prompt_async(prompt, wanted)
    assert len(await renderer.render_cmpl_async([{"prompt": "a"}] * 3, COUNTED)) == 3
    with pytest.raises(VLLMValidationError, match="4 prompts.* at most 3"):
        await renderer.render_cmpl_async([{"prompt": "a"}] * 4, COUNTED)


def scoring_request(**fields: Any) -> Any:
    return SimpleNamespace(
        **fields, model_copy=lambda update: SimpleNamespace(**{**fields, **update})
    )


async def test_scoring_gets_the_same_prompts_without_tokenizing_in_the_loop(renderer: Any) -> None:
    scoring = ServingGenerativeScoring.__new__(ServingGenerativeScoring)
    tokenizer = renderer.tokenizer
    request = scoring_request(
        query="is it red? ",
        items=["a rose", "the sea"],
        item_first=False,
        add_special_tokens=True,
        cache_salt=None,
    )
    expected = await scoring._build_prompts(request, tokenizer, 1024)
    BoundedTokenization(renderer, 2).install(scoring)
    assert await scoring._build_prompts(request, None, 1024) == expected
    with pytest.raises(VLLMValidationError, match="3 items.* at most 2"):
        await scoring._build_prompts(scoring_request(query="", items=["a"] * 3), None, 1024)


def test_bad_words_are_bounded_together() -> None:
    check_bad_words(SamplingParams())
    check_bad_words(SamplingParams(bad_words=["a" * 100, "b" * 100]))
    with pytest.raises(VLLMValidationError, match="20001 characters together; the limit is 16384"):
        check_bad_words(SamplingParams(bad_words=["a" * 20_000, "b"]))
