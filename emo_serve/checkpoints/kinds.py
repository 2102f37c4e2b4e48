"""Kinds of JSON values: a test, and the words that say what passes it.

The JSON files beside a checkpoint's weights are described as tables, field -> `Kind`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from emo_serve.checkpoints.json_file import shown
from emo_serve.errors import ConfigError

__all__ = [
    "COUNT",
    "FLAG",
    "OBJECT",
    "POSITIVE",
    "REAL",
    "TEXT",
    "TEXTS",
    "TOKENS",
    "Kind",
    "check_table",
    "integer",
    "number",
]

_MOST_INTEGER = 2**31 - 1
_MOST_FP32 = 3.4028234663852886e38
_LARGEST_EXACT = 2**53  # of integers that a float can hold


@dataclass(frozen=True)
class Kind:
    """A set of JSON values: what it expects, in words, and a test."""

    words: str
    holds: Callable[[object], bool]

    def or_null(self) -> Kind:
        """Return this kind with null in it."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.holds(value))

    def or_(self, other: Kind) -> Kind:
        """Return the values of either kind."""
        words = f"{self.words} or {other.words}"
        return Kind(words, lambda value: self.holds(value) or other.holds(value))

    def list(self, words: str) -> Kind:
        """Return the kind of lists of these values, described as `words`."""
        return Kind(
            words,
            lambda value: isinstance(value, list | tuple) and all(map(self.holds, value)),
        )

    def table(self, words: str) -> Kind:
        """Return the kind of objects with these values, described as `words`."""
        return Kind(
            words, lambda value: isinstance(value, dict) and all(map(self.holds, value.values()))
        )


def check_table(
    kinds: Mapping[str, Kind], fields: Mapping[str, object], path: Path | None = None
) -> None:
    """Raise ConfigError, with field, value and expectation, for the first field of a wrong kind.

    `path` is the file to blame, None where the caller names it.
    """
    place = "" if path is None else f"{path}: "
    for name, kind in kinds.items():
        if name in fields and not kind.holds(fields[name]):
            raise ConfigError(f"{place}{name} is {shown(fields[name])}; expected {kind.words}")


def integer(at_least: int, at_most: int = _MOST_INTEGER) -> Kind:
    """Return the kind of integers in a range."""

    def holds(value: object) -> bool:
        return type(value) is int and at_least <= value <= at_most  # a bool is an int too

    return Kind(f"an integer of at least {at_least} and at most {at_most}", holds)


def number(words: str, holds: Callable[[float], bool] = lambda _: True) -> Kind:
    """Return the kind of finite numbers that float32 can hold and that `holds`."""

    def is_number(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(value, int) and abs(value) > _LARGEST_EXACT:
            return False
        return math.isfinite(value) and abs(value) <= _MOST_FP32 and holds(float(value))

    return Kind(words, is_number)


TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = TEXT.list("a list of strings")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
COUNT = integer(0)
REAL = number("a finite number that float32 can hold")
POSITIVE = number("a finite number above 0 that float32 can hold", lambda value: value > 0)
TOKENS = Kind("a token id", integer(-1).holds).or_(integer(-1).list("a list of them"))
"""-1 stands for no token in some files."""
