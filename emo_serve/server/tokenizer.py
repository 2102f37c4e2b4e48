"""What the server needs of the served model's tokenizer, which is vLLM's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["ServedTokenizer"]


class ServedTokenizer(Protocol):
    """Turn text and chats into token ids exactly as requests are.

    Raises RequestError for input that the tokenizer or the chat template refuses.
    """

    async def encode(self, text: str) -> list[int]:
        """Return the ids of a text prompt, special tokens included."""
        ...

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, rendered by the served chat template.

        Unless the last turn is the assistant's, the assistant's turn is opened, as when serving.
        """
        ...

    async def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...
