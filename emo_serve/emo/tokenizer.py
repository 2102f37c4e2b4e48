"""A model's tokenizer: turns text and chats into ids as the server does.

Text is encoded by `tokenizer.json` with its special tokens. A chat is rendered by the model's chat
template and encoded without adding special tokens, because the template writes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from emo_serve.emo.config import load_config
from emo_serve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ModelTokenizer"]


class ModelTokenizer:
    """The tokenizer of one checkpoint directory; raises ConfigError naming file and reason."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; text cannot be tokenized without it")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library's errors are plain Exceptions
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids)))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation.

        If it does not end with an assistant turn, that turn is opened, as in a served prompt.
        """
        renderer = self._renderer
        if not renderer.chat_template:
            raise ConfigError(f"{self.directory} has no chat template; give texts, not messages")
        is_open = messages[-1].get("role") != "assistant"
        try:
            text = renderer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ConfigError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _renderer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        # given the config, transformers does not warn about an unknown model type
        config = load_config(self.directory)
        try:
            return AutoTokenizer.from_pretrained(self.directory, config=config)
        except Exception as error:  # it reads several files, and each way to fail is its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{self.directory}: transformers cannot read the tokenizer's files: {reason}"
            ) from error
