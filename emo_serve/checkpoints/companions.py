"""The JSON files beside config.json: their shape, checked before a library computes with them.

transformers and vLLM read them when a model is served, text is tokenized or a chat is rendered, and
fail with a traceback on valid JSON of a wrong shape. Only fields that they read are described here;
others may hold anything, and a file may be absent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from emo_serve.checkpoints.json_file import read_object
from emo_serve.checkpoints.kinds import (
    FLAG,
    OBJECT,
    POSITIVE,
    TEXT,
    TEXTS,
    TOKENS,
    Kind,
    check_table,
    integer,
    number,
)
from emo_serve.errors import ConfigError

__all__ = ["check_companions"]

_GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer.json"


def check_companions(directory: Path) -> None:
    """Raise ConfigError naming file, field, value and expectation."""
    for name, kinds in _FILES.items():
        path = directory / name
        try:
            fields = read_object(path)
        except FileNotFoundError:
            continue
        every = kinds.get("*")
        check_table(kinds if every is None else dict.fromkeys(fields, every), fields, path)
        if name == _GENERATION:
            _check_generation(path, fields)
        elif name == _TOKENIZER:
            _check_tokenizer(path)


def _check_generation(path: Path, fields: Mapping[str, object]) -> None:
    """Have transformers read the defaults of sampling, which it checks against each other."""
    from transformers import GenerationConfig

    advice = logging.getLogger(GenerationConfig.__module__)
    level = advice.level
    advice.setLevel(logging.CRITICAL)  # it is given when the server reads the file
    try:
        GenerationConfig(**fields)
    except Exception as error:  # each way to fail is its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{path}: transformers cannot read it: {reason}") from error
    finally:
        advice.setLevel(level)


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library's errors are plain Exceptions
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: the tokenizers library cannot read it: {reason}") from error


# -- fields --


def _is_added_tokens(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str)
        and key.isascii()
        and key.isdigit()
        and isinstance(token, dict)
        and isinstance(token.get("content"), str)
        for key, token in value.items()
    )


def _is_named_template(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("name", "template")
    )


_TOKEN = TEXT.or_(OBJECT)
_TOKEN_LIST = _TOKEN.list("a list of strings or objects")
_TEMPLATES = Kind("", _is_named_template).list("a list of named templates")
_NOT_NEGATIVE = number("a finite number of 0 or more", lambda value: value >= 0)
_PROBABILITY = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_LENGTH = Kind(
    "a number",  # for no limit files give one of 31 digits
    lambda value: isinstance(value, int | float) and not isinstance(value, bool),
)
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_TOKENIZER_FIELDS: dict[str, Kind] = {
    "tokenizer_class": TEXT.or_null(),
    "chat_template": TEXT.or_(_TEMPLATES).or_(TEXT.table("an object of templates")).or_null(),
    **{f"{name}_token": _TOKEN.or_null() for name in _SPECIAL_TOKENS},
    "additional_special_tokens": _TOKEN_LIST.or_null(),
    "extra_special_tokens": _TOKEN_LIST.or_(OBJECT).or_null(),
    "added_tokens_decoder": Kind(
        'an object from ids to objects with "content"', _is_added_tokens
    ).or_null(),
    "model_max_length": _LENGTH.or_null(),
    "model_input_names": TEXTS.or_null(),
    "padding_side": TEXT.or_null(),
    "truncation_side": TEXT.or_null(),
    "add_bos_token": FLAG.or_null(),
    "add_eos_token": FLAG.or_null(),
    "auto_map": OBJECT.or_null(),
}

_FILES: dict[str, dict[str, Kind]] = {
    _GENERATION: {
        "temperature": _NOT_NEGATIVE.or_null(),
        "top_p": _PROBABILITY.or_null(),
        "min_p": _PROBABILITY.or_null(),
        "top_k": integer(-1).or_null(),
        "repetition_penalty": POSITIVE.or_null(),
        "max_new_tokens": integer(1).or_null(),
        "bos_token_id": TOKENS.or_null(),
        "eos_token_id": TOKENS.or_null(),
        "pad_token_id": TOKENS.or_null(),
        "do_sample": FLAG.or_null(),
    },
    "tokenizer_config.json": _TOKENIZER_FIELDS,
    _TOKENIZER: {"model": OBJECT, "added_tokens": OBJECT.list("a list of objects").or_null()},
    "special_tokens_map.json": {"*": _TOKEN.or_(_TOKEN_LIST).or_null()},
    "added_tokens.json": {"*": integer(0)},
}
"""File -> the kinds of its fields; `*` is every field."""
