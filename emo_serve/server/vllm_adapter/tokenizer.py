"""The engine's tokenizer and chat template: the server itself reads text exactly as it serves it.

`auto` and builds on the server tokenize prompts and examples themselves. They use vLLM's own
renderer, which honours --tokenizer, --tokenizer-mode, --chat-template and similar flags, and runs
in its own threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.exceptions import VLLMError
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.utils.mistral import is_mistral_tokenizer

from emo_serve.errors import RequestError
from emo_serve.server.vllm_adapter.tokenization import longest_text

__all__ = ["EngineTokenizer"]


class EngineTokenizer:
    """A ServedTokenizer over an engine's renderer, with the chat template given by the flags."""

    def __init__(self, renderer: Any, args: argparse.Namespace) -> None:
        self._renderer = renderer
        self._template = load_chat_template(args.chat_template)
        self._content_format = args.chat_template_content_format
        self._template_kwargs = resolve_default_chat_template_kwargs(args) or {}
        # As for a request (OnlineRenderer.preprocess_chat).
        self._tokenizes = (
            is_mistral_tokenizer(renderer.tokenizer) or renderer.model_config.enable_prompt_embeds
        )

    async def encode(self, text: str) -> list[int]:
        """Return the ids of a text prompt, special tokens included."""
        return await self._ids({"prompt": text}, adds_special_tokens=True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, rendered by the served chat template."""
        is_open = messages[-1].get("role") != "assistant"
        turn = {"add_generation_prompt": is_open, "continue_final_message": False}
        params = ChatParams(
            chat_template=self._template,
            chat_template_content_format=self._content_format,
            chat_template_kwargs={**self._template_kwargs, **turn, "tokenize": self._tokenizes},
        )
        # The template is a program of the model's, which raises what it likes.
        with _refusing("chat template", "these messages", (Exception,)):
            _, prompt = await self._renderer.render_messages_async(list(messages), params)
        return await self._ids(prompt, adds_special_tokens=False)

    async def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        with _refusing("tokenizer", "these ids"):
            self._renderer.get_tokenizer()  # raises if the server has none
            decode = self._renderer._async_tokenizer_decode  # in the thread that encodes
            return str(await decode(list(ids), skip_special_tokens=True))

    async def _ids(self, prompt: Mapping[str, Any], *, adds_special_tokens: bool) -> list[int]:
        params = TokenizeParams(max_total_tokens=None, add_special_tokens=adds_special_tokens)
        if isinstance(text := prompt.get("prompt"), str):  # what does not fit is cut off later
            prompt = {**prompt, "prompt": text[: longest_text(self._renderer)]}
        with _refusing("tokenizer", "this text"):
            (encoded,) = await self._renderer.tokenize_prompts_async([prompt], params)
        return list(encoded["prompt_token_ids"])


_BAD_TEXT = (VLLMError, LookupError, OverflowError, TypeError, ValueError)


@contextmanager
def _refusing(
    part: str, what: str, kinds: tuple[type[Exception], ...] = _BAD_TEXT
) -> Iterator[None]:
    """Turn errors of these kinds into RequestError."""
    try:
        yield
    except kinds as error:
        raise RequestError(f"the model's {part} refuses {what}: {error}") from error
