"""Read JSON files that people edit by hand, and say exactly what is wrong with them.

Stricter than `json`: unknown keys and keys given twice are refused, and neither a bool nor NaN is a
number. Every refusal is a PoolFileError naming file, layer, field, value, and what was expected.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path

from emo_serve.errors import PoolFileError

__all__ = [
    "optional_text",
    "parse_json",
    "read_json",
    "refusal",
    "require_key",
    "required_object",
    "required_real",
]

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80
_shown.maxlist = _shown.maxdict = 4


def refusal(
    source: str, field: str, value: object, expected: str, layer: int | None = None
) -> PoolFileError:
    """Build the error for one bad value; long values are shortened."""
    return PoolFileError(
        f"{_place(source, layer)}: {field} is {_shown.repr(value)}; expected {expected}"
    )


def read_json(path: Path) -> object:
    """Parse one UTF-8 JSON file; raises PoolFileError for anything short of that."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PoolFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(str(path), text)


def parse_json(source: str, text: bytes) -> object:
    """Parse UTF-8 JSON that came from `source`; raises PoolFileError."""

    def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise PoolFileError(f"{source}: key {twice!r} is given twice in one object")
        return fields

    try:
        document: object = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise PoolFileError(f"{source}: is not UTF-8 JSON: {error}") from error
    return document


def required_object(
    source: str,
    field: str,
    value: object,
    *,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    layer: int | None = None,
) -> Mapping[str, object]:
    """Return `value` as a JSON object that has the required keys and no unknown one."""
    if not isinstance(value, dict):
        raise refusal(source, field, value, "an object", layer)
    known = [*required, *optional]
    for key in value:
        if key not in known:
            raise refusal(source, f"a key of {field}", key, f"one of {', '.join(known)}", layer)
    for key in required:
        require_key(source, field, value, key, layer)
    return value


def require_key(
    source: str, field: str, value: Mapping[str, object], key: str, layer: int | None = None
) -> object:
    """Return one value of a JSON object, whose other keys may be anything."""
    if key not in value:
        raise PoolFileError(f"{_place(source, layer)}: {key!r} is missing from {field}")
    return value[key]


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


def optional_text(source: str, field: str, value: object) -> str | None:
    """Return `value` as a string, or None when it is absent or null."""
    if value is None or isinstance(value, str):
        return value
    raise refusal(source, field, value, "a string")


def _place(source: str, layer: int | None) -> str:
    return source if layer is None else f"{source}: layer {layer}"
