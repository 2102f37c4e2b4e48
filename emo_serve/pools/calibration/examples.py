"""Examples of a domain: from files to documents of token ids.

A `.txt` file is ONE document, blank lines and all: paragraphs belong together. Give several files
for several documents. A `.jsonl` file has one document a line: a JSON string, or an object with
"text", or with "messages", a chat that the model's template renders; other keys are ignored, and
so are blank lines. A running server takes the same values in a request's body (`parse_example`). A
document longer than the model's context is cut to it, as the released scripts do.

torch is imported to encode examples, not to read them: who sends them to a server needs none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from emo_serve.emo.config import EmoConfig
    from emo_serve.emo.tokenizer import ModelTokenizer

__all__ = ["Documents", "Example", "encode_examples", "parse_example", "read_examples"]

_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt",)
_CHAT_KEYS = ("role", "content")


@dataclass(frozen=True)
class Example:
    """One document before it is tokenized; `source` is its file and line."""

    source: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Documents:
    """Documents as int64 ids [T], and what was left of those longer than `limit` tokens."""

    ids: tuple[Tensor, ...]
    num_cut: int = 0
    tokens_cut: int = 0
    limit: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all documents, without those that were cut off."""
        return sum(map(len, self.ids))


def read_examples(paths: Iterable[Path]) -> list[Example]:
    """Read every document of the files, in order; ConfigError names file, line and remedy."""
    return [example for path in paths for example in _read_file(path)]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: ModelTokenizer,
    config: EmoConfig,
    max_tokens: int | None = None,
) -> Documents:
    """Tokenize the examples and cut them to the model's context, or to `max_tokens` if less."""
    import torch

    limit = min(config.max_position_embeddings, max_tokens or config.max_position_embeddings)
    documents: list[Tensor] = []
    num_cut = tokens_cut = 0
    for example in examples:
        try:
            ids = (
                tokenizer.encode(example.text)
                if example.text is not None
                else tokenizer.encode_chat(example.messages)
            )
        except ConfigError as error:
            raise ConfigError(f"{example.source}: {error}") from error
        if not ids:
            raise ConfigError(f"{example.source}: the tokenizer makes no token of this text")
        if max(ids) >= config.vocab_size:
            raise ConfigError(
                f"{example.source}: the tokenizer gives id {max(ids)}, the model has"
                f" {config.vocab_size}; is tokenizer.json this model's?"
            )
        num_cut += len(ids) > limit
        tokens_cut += max(0, len(ids) - limit)
        documents.append(torch.tensor(ids[:limit]))
    return Documents(tuple(documents), num_cut, tokens_cut, limit)


def _read_file(path: Path) -> Iterator[Example]:
    if path.suffix not in (*_LINES, *_TEXT):
        raise ConfigError(f"{path} ends with {path.suffix!r}; give .jsonl or .txt")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty; give at least one example")
    if path.suffix in _TEXT:
        yield Example(str(path), text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split inside strings
        if line.strip():
            yield _parse_line(f"{path}:{number}", line)


def _parse_line(source: str, line: str) -> Example:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is not JSON: {error}") from error
    return parse_example(source, value)


def parse_example(source: str, value: object) -> Example:
    """Return the document that a JSON value stands for; ConfigError names `source`."""
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        found = (
            f"an object of {', '.join(value) or 'no keys'}" if isinstance(value, dict) else value
        )
        raise ConfigError(
            f'{source}: is {str(found)[:80]}; expected a string, or an object with either "text" or'
            ' "messages"'
        )
    if "messages" in value:
        return Example(source, messages=_checked_messages(source, value["messages"]))
    if not isinstance(value["text"], str) or not value["text"].strip():
        raise ConfigError(f'{source}: "text" is {str(value["text"])[:80]!r}; expected some text')
    return Example(source, value["text"])


def _checked_messages(source: str, value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f'{source}: "messages" is {str(value)[:80]!r}; expected a list of them')
    for message in value:
        is_chat = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in _CHAT_KEYS
        )
        if not is_chat:
            raise ConfigError(
                f"{source}: a message is {str(message)[:80]}; expected an object with the strings"
                ' "role" and "content"'
            )
    return tuple(value)
