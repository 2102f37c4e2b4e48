"""A model's tokenizer: text and chats to ids, as the server makes them of a prompt.

Text goes through `tokenizer.json` with its special tokens. A chat is rendered by the model's chat
template and then encoded without further ones, for the template writes its own.
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
            raise ConfigError(
                f"{path} does not exist; the model's text cannot be tokenized without"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library's errors are plain Exceptions
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that stands by itself."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids)))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation.

        One that does not end with the assistant's turn is opened for it, as a served prompt is.
        """
        renderer = self._renderer
        if not renderer.chat_template:
            raise ConfigError(f"{self.directory} has no chat template; give texts, not messages")
        is_open = messages[-1].get("role") != "assistant"
        try:
            text = renderer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # a template is a program of the model's and fails as it likes
            raise ConfigError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _renderer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        # with the config given, transformers does not warn that it does not know the model's type
        return AutoTokenizer.from_pretrained(self.directory, config=load_config(self.directory))
