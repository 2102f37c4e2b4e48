"""Read JSON files that people edit by hand, and say exactly what is wrong with them.

Stricter than `json`: a key given twice is refused, and neither a bool nor NaN is a number. Every
refusal is one line that names file, layer, field, value, and what was expected.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path

from emo_serve.errors import PoolFileError

__all__ = [
    "missing_text",
    "parse_json",
    "place_of",
    "read_json",
    "refusal",
    "refusal_text",
    "required_real",
]

_MOST_BYTES = 64 * 2**20  # 8 MiB is a pool of 64 layers with 4096 experts each

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80
_shown.maxlist = _shown.maxdict = 4


def refusal(
    source: str, field: str, value: object, expected: str, layer: int | None = None
) -> PoolFileError:
    """Build the error for one bad value; long values are shortened."""
    return PoolFileError(refusal_text(source, field, value, expected, layer))


def refusal_text(
    source: str, field: str, value: object, expected: str, layer: int | None = None
) -> str:
    """Say what is wrong with one value; long values are shortened."""
    return f"{_place(source, layer)}: {field} is {_shown.repr(value)}; expected {expected}"


def missing_text(source: str, key: str, field: str, layer: int | None = None) -> str:
    """Say that the object `field` lacks a key."""
    return f"{_place(source, layer)}: {key!r} is missing from {field}"


def read_json(path: Path) -> object:
    """Parse one UTF-8 JSON file; raises PoolFileError for anything short of that."""
    place = place_of(path)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise PoolFileError(f"{place}: cannot be read: {error.strerror or error}") from error
    if len(text) > _MOST_BYTES:
        raise PoolFileError(f"{place}: is larger than {_MOST_BYTES // 2**20} MiB")
    return parse_json(place, text)


def place_of(path: Path) -> str:
    """Return a path as it stands in errors, which are shown in JSON and on terminals."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(path)
    )


def parse_json(source: str, text: bytes) -> object:
    """Parse UTF-8 JSON that came from `source`, after a byte order mark if it has one.

    Raises PoolFileError.
    """

    def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise PoolFileError(f"{source}: key {_shown.repr(twice)} is given twice in one object")
        return fields

    try:
        document: object = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise PoolFileError(f"{source}: is not UTF-8 JSON: {error}") from error
    return document


def required_real(
    source: str, field: str, value: object, expected: str, layer: int | None = None
) -> float:
    """Return `value` as a finite float; integers count, bools do not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            real = float(value)
        except OverflowError:
            real = math.inf
        if math.isfinite(real):
            return real
    raise refusal(source, field, value, expected, layer)


def _place(source: str, layer: int | None) -> str:
    return source if layer is None else f"{source}: layer {layer}"
