"""Bounds on what one request may make vLLM's renderer tokenize, and a thread for long texts.

vLLM tokenizes in one thread, checks the length of a text only where it is going to generate, and
scoring tokenizes in the event loop. So one long text would keep every other request waiting. Here a
text that could never fit the model is refused before it is tokenized, on every route, and so are
more prompts than a pool admits. A request with much text is tokenized in a thread of its own kind,
where only other such requests wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import SamplingParams

from emo_serve.server.asgi.context import current_request

__all__ = ["BoundedTokenization", "check_bad_words", "longest_text"]

_SHORT_CHARS = 32 * 2**10
"""The text of one request that may use vLLM's own thread: up to some 0.2 s of its time."""
_MAX_BAD_WORD_CHARS = 16 * 2**10
"""vLLM tokenizes bad words in the event loop, and takes 1024 tokens of them at most."""


def longest_text(renderer: Any) -> int:
    """Return the characters of the longest text that could fit the model's context."""
    tokens = int(renderer.model_config.max_model_len)
    tokenizer = renderer.tokenizer
    return tokens if tokenizer is None else tokens * int(tokenizer.max_chars_per_token)


def check_bad_words(params: SamplingParams) -> None:
    """Raise VLLMValidationError for bad words that would take long to tokenize."""
    if (total := sum(map(len, params.bad_words or ()))) > _MAX_BAD_WORD_CHARS:
        raise VLLMValidationError(
            f"bad_words have {total} characters together; the limit is {_MAX_BAD_WORD_CHARS};"
            " send fewer or shorter ones",
            parameter="bad_words",
        )


class BoundedTokenization:
    """The bounded methods of one renderer; `install` puts them in place of vLLM's.

    `max_prompts` is the number of prompts that one request may have; None is no limit. All methods
    raise VLLMValidationError beyond a limit.
    """

    def __init__(self, renderer: Any, max_prompts: int | None) -> None:
        self._renderer, self._max_prompts = renderer, max_prompts
        self._max_tokens = int(renderer.model_config.max_model_len)
        self._max_chars = longest_text(renderer)
        self._tokenize_short = renderer._tokenize_prompt_async
        self._decode_short = renderer._async_tokenizer_decode
        self._render_prompts = renderer.render_cmpl_async
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long-text")
        renderer._resources.callback(self._long.shutdown, wait=False, cancel_futures=True)

    def install(self, scoring: Any | None) -> None:
        """Bound the renderer, and vLLM's scoring, which does not use it; None if not served."""
        self._renderer._tokenize_prompt_async = self._tokenize
        self._renderer._async_tokenizer_decode = self._decode
        self._renderer.render_cmpl_async = self._render
        if scoring is not None:
            self._build_scoring = scoring._build_prompts
            scoring._build_prompts = self._score

    async def _tokenize(self, prompt: Any, params: TokenizeParams) -> Any:
        text = prompt["prompt"]
        if len(text) > self._max_chars:
            prompt = {**prompt, "prompt": self._cut(text, params)}
        if self._is_short(len(text)):
            return await self._tokenize_short(prompt, params)
        return await self._in_long(self._renderer._tokenize_prompt, prompt, params)

    def _cut(self, text: str, params: TokenizeParams) -> str:
        """Return the part of a long text that its truncation leaves, or more; raise without one."""
        limit = self._max_chars
        if params.truncate_prompt_tokens is None or params.return_token_offsets:
            raise VLLMValidationError(
                f"the text has {len(text)} characters; one that fits the model's"
                f" {self._max_tokens} tokens has at most {limit}; send less",
                parameter="input_text",
                value=len(text),
            )
        side = params.truncation_side or self._renderer.tokenizer.truncation_side
        return text[-limit:] if side == "left" else text[:limit]

    async def _decode(self, ids: Any, *args: Any, **options: Any) -> Any:
        if len(ids) > self._max_tokens:
            raise VLLMValidationError(
                f"there are {len(ids)} tokens; the limit is the model's context of"
                f" {self._max_tokens}; send them in parts",
                parameter="tokens",
                value=len(ids),
            )
        if self._is_short(len(ids)):
            return await self._decode_short(ids, *args, **options)
        return await self._in_long(self._renderer._decode, ids, *args, **options)

    async def _render(self, prompts: Sequence[Any], *args: Any, **options: Any) -> Any:
        self._check_count(len(prompts), "prompts", "prompt")
        return await self._render_prompts(prompts, *args, **options)

    async def _score(self, request: Any, tokenizer: Any, max_model_len: int) -> Any:
        """Build scoring's prompts from token ids, which are made here instead of in the loop."""
        self._check_count(len(request.items), "items", "items")
        ids = [await self._ids(item, adds_special_tokens=False) for item in request.items]
        query = await self._ids(request.query, adds_special_tokens=request.add_special_tokens)
        tokenized = request.model_copy(update={"query": query, "items": ids})
        return await self._build_scoring(tokenized, tokenizer, max_model_len)

    def _check_count(self, count: int, what: str, parameter: str) -> None:
        if self._max_prompts is not None and count > self._max_prompts:
            raise VLLMValidationError(
                f"the request has {count} {what}, and a pool may have at most {self._max_prompts}"
                " requests running and queued; send several requests, or raise --max-queued",
                parameter=parameter,
                value=count,
            )

    async def _ids(self, text: str | list[int], *, adds_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            return text
        params = TokenizeParams(max_total_tokens=None, add_special_tokens=adds_special_tokens)
        tokens = await self._tokenize({"prompt": text}, params)
        return list(tokens["prompt_token_ids"])

    def _is_short(self, size: int) -> bool:
        """Count this much text for the current request; tell whether it is still little."""
        context = current_request()
        context.text_size += size
        return context.text_size <= _SHORT_CHARS

    async def _in_long(self, work: Any, *args: Any, **options: Any) -> Any:
        current_request().on_entered()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._long, lambda: work(*args, **options))
