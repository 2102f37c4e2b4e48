"""A ServedTokenizer over a checkpoint's files, for tests without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.errors import ConfigError, RequestError


class FileTokenizer:
    """Open the files when first asked; refuse as the engine's tokenizer does."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def encode(self, text: str) -> list[int]:
        try:
            return ModelTokenizer(self._directory).encode(text)
        except ConfigError as error:
            raise RequestError(str(error)) from error

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return ModelTokenizer(self._directory).encode_chat(messages)
        except ConfigError as error:
            raise RequestError(str(error)) from error

    async def decode(self, ids: Sequence[int]) -> str:
        return ModelTokenizer(self._directory).decode(ids)
