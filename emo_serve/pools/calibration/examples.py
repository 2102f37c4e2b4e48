"""Examples of a domain: from files to documents of token ids.

A `.txt` file is ONE document, including blank lines: paragraphs belong together. Give several files
for several documents. A `.jsonl` file has one document per line: a JSON string, an object with
"text", or an object with "messages", a chat that the model's template renders. Other keys and blank
lines are ignored. A request to build a pool holds the same values (`WrittenExample`). A document
longer than the model's context is cut to it, as the released scripts do.

torch is imported to encode examples, not to read them, so a client of a server does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from emo_serve.errors import ConfigError
from emo_serve.pools.strict_model import Expected, validated

if TYPE_CHECKING:
    from torch import Tensor

    from emo_serve.emo.tokenizer import ModelTokenizer
    from emo_serve.facts import ModelFacts

__all__ = [
    "Documents",
    "Example",
    "ExampleChat",
    "ExampleMessage",
    "ExampleText",
    "WrittenExample",
    "documents_of",
    "encode_examples",
    "example_of",
    "read_examples",
]

_LINES = (".jsonl", ".ndjson")
_TEXT = (".txt",)


# -- as written: a line of a .jsonl file, an entry of a request --


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is blank")
    _encoded(text)
    return text


def _encoded(text: str) -> None:
    """Raise ValueError for lone surrogates, which no tokenizer takes."""
    if not text.isascii():
        text.encode("utf-8")


class _Written(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


_Text = Annotated[
    str,
    Field(min_length=1, json_schema_extra={"pattern": r"\S"}),  # `_some_text`, for a schema
    AfterValidator(_some_text),
    Expected("some text, without lone surrogates"),
]


class ExampleText(_Written):
    """One document; other keys are ignored."""

    text: _Text


class ExampleMessage(_Written):
    """One message of a chat; other keys are for the model's template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str

    @model_validator(mode="after")
    def _check_text(self) -> ExampleMessage:
        """Refuse lone surrogates anywhere, since the template may use any key."""
        _encoded(json.dumps(self.model_dump(), ensure_ascii=False))
        return self


_Message = Annotated[ExampleMessage, Expected('an object with the strings "role" and "content"')]


class ExampleChat(_Written):
    """One conversation; other keys are ignored."""

    messages: Annotated[list[_Message], Field(min_length=1), Expected("a list of messages")]


def _by_shape(value: object, handler: ValidatorFunctionWrapHandler) -> ExampleText | ExampleChat:
    """Read a value as what it looks like, so that a refusal is about that and nothing else."""
    if isinstance(value, str):
        return ExampleText.model_validate({"text": value})
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        raise PydanticCustomError(
            "expected", 'a string, or an object with either "text" or "messages"'
        )
    return (ExampleText if "text" in value else ExampleChat).model_validate(value)


WrittenExample = Annotated[_Text | ExampleText | ExampleChat, WrapValidator(_by_shape)]
"""A string stands for a text; it is never one after validation."""

_ADAPTER: TypeAdapter[str | ExampleText | ExampleChat] = TypeAdapter(WrittenExample)


# -- as read --


@dataclass(frozen=True)
class Example:
    """One document before it is tokenized; `source` is its file and line."""

    source: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()

    def as_json(self) -> object:
        """Return the value that stands for it in a line of a .jsonl file and in a request."""
        return self.text if self.text is not None else {"messages": list(self.messages)}


@dataclass(frozen=True)
class Documents:
    """Documents as int64 ids [T]; `num_cut` of them lost `tokens_cut` tokens beyond `limit`."""

    ids: tuple[Tensor, ...]
    num_cut: int = 0
    tokens_cut: int = 0
    limit: int = 0

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all documents, not counting those cut off."""
        return sum(map(len, self.ids))


def read_examples(paths: Iterable[Path]) -> list[Example]:
    """Read every document of the files, in order; ConfigError names file, line and remedy."""
    return [example for path in paths for example in _read_file(path)]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: ModelTokenizer,
    facts: ModelFacts,
    max_tokens: int | None = None,
) -> Documents:
    """Tokenize the examples and cut them to the model's context, or to `max_tokens` if less."""
    encoded: list[list[int]] = []
    for example in examples:
        try:
            encoded.append(
                tokenizer.encode(example.text)
                if example.text is not None
                else tokenizer.encode_chat(example.messages)
            )
        except ConfigError as error:
            raise ConfigError(f"{example.source}: {error}") from error
    return documents_of(examples, encoded, facts, max_tokens)


def documents_of(
    examples: Sequence[Example],
    encoded: Sequence[Sequence[int]],
    facts: ModelFacts,
    max_tokens: int | None = None,
) -> Documents:
    """Make documents of examples and their ids, cut as `encode_examples` says.

    Raises ConfigError for an example without any token, or with one the model does not have.
    """
    import torch

    limit = min(facts.max_position_embeddings, max_tokens or facts.max_position_embeddings)
    documents: list[Tensor] = []
    num_cut = tokens_cut = 0
    for example, ids in zip(examples, encoded, strict=True):
        if not ids:
            raise ConfigError(f"{example.source}: the tokenizer returns no token for this text")
        if max(ids) >= facts.vocab_size:
            raise ConfigError(
                f"{example.source}: the tokenizer gives id {max(ids)}, the model has"
                f" {facts.vocab_size}; is tokenizer.json this model's?"
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
    return example_of(source, validated(_ADAPTER, source, value, "the example", ConfigError))


def example_of(source: str, written: str | ExampleText | ExampleChat) -> Example:
    """Return the document that was written at `source`."""
    if isinstance(written, ExampleChat):
        return Example(source, messages=tuple(m.model_dump() for m in written.messages))
    return Example(source, written if isinstance(written, str) else written.text)
