"""The first tokens of a prompt: a choice looks at nothing else."""

from __future__ import annotations

from emo_serve.errors import RequestError
from emo_serve.names import AUTO_POOL
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.tokenizer import ServedTokenizer

__all__ = ["PromptPrefix"]

_CHARS_PER_TOKEN = 16  # limits the text to tokenize; only runs of one character have more


class PromptPrefix:
    """Cut prompts to their first `num_tokens` tokens, as ids or as text."""

    def __init__(self, tokenizer: ServedTokenizer, num_tokens: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._vocab_size = vocab_size

    async def ids(self, prompt: Prompt) -> list[int]:
        """Return the first token ids.

        Raises RequestError for ids outside the vocabulary, and for a prompt without tokens.
        """
        ids = self._known_ids(prompt) if prompt.ids else await self._encoded(prompt.text)
        if not ids:
            raise RequestError(f"model {AUTO_POOL!r} needs a prompt with at least one token")
        return ids

    async def text(self, prompt: Prompt) -> str:
        """Return the text of the first ids; raises as `ids` does."""
        return await self._tokenizer.decode(await self.ids(prompt))

    def _known_ids(self, prompt: Prompt) -> list[int]:
        ids = prompt.ids[: self._num_tokens]
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"the prompt has token id {wrong}; expected 0 to {self._vocab_size - 1}"
            )
        return list(ids)

    async def _encoded(self, text: str) -> list[int]:
        start = text[: self._num_tokens * _CHARS_PER_TOKEN]
        valid = start.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
        try:
            ids = await self._tokenizer.encode(valid)
        except RequestError as error:
            raise RequestError(f"model {AUTO_POOL!r} cannot read this prompt: {error}") from error
        return ids[: self._num_tokens]
