"""What the server asks of the served model's tokenizer; vLLM's own is behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["ServedTokenizer"]


class ServedTokenizer(Protocol):
    """Turn text and chats into ids exactly as requests are; raises RequestError for what cannot."""

    async def encode(self, text: str) -> list[int]:
        """Return the ids of a text prompt, special tokens included."""
        ...

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, rendered by the served chat template.

        Unless it ends with the assistant's turn, that turn is opened, as in a served prompt.
        """
        ...

    async def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        ...
