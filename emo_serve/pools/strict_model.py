"""Formats as pydantic models that read strictly and refuse in one line.

A format is written down once, as a `StrictModel`: the same model reads files and HTTP bodies and
describes them in /openapi.json. `validated` turns pydantic's report into the refusals of
`strict_json`: source, layer, field, value, and what was expected. `Expected` gives a field words of
its own for the last of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from emo_serve.errors import EmoServeError, PoolFileError
from emo_serve.pools.strict_json import missing_text, refusal_text

__all__ = ["Expected", "StrictModel", "validated"]

_T = TypeVar("_T")
_Location = tuple[int | str, ...]

_EXPECTED = "expected"
_UNKNOWN_KEY = "unknown_key"
_WORDS = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}
"""What was expected, by pydantic's type of error, where no `Expected` says it better."""

_BY_LAYER: tuple[_Location, ...] = (("layers",), ("model", "implied"))
"""Lists with one entry per layer of the model."""


@dataclass(frozen=True)
class Expected:
    """Annotate a type with words for what it takes; they replace pydantic's.

    On a list the words are for the list itself, and its items have their own. On anything else they
    cover all that is inside. Stands last in its `Annotated`.
    """

    words: str

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        if schema["type"] != "list":
            return core_schema.custom_error_schema(
                schema, _EXPECTED, custom_error_message=self.words
            )
        items = cast(core_schema.ListSchema, schema)
        items["fail_fast"] = True  # one refusal is reported, and a body can hold millions
        shortest = items.get("min_length", 0)

        def check(value: object) -> object:
            if not isinstance(value, list) or len(value) < shortest:
                raise PydanticCustomError(_EXPECTED, self.words)
            return value

        return core_schema.no_info_before_validator_function(check, items)


class StrictModel(BaseModel):
    """A JSON object: no unknown keys, and no value converted but an integer to a float."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: object) -> object:
        """Refuse unknown keys before all else; pydantic's own report cannot name the known ones."""
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise PydanticCustomError(
                    _UNKNOWN_KEY, "one of {known}", {"known": known, "key": key}
                )
        return value


def validated(
    kind: type[_T] | TypeAdapter[_T],
    source: str,
    value: object,
    whole: str,
    error_class: type[EmoServeError] = PoolFileError,
) -> _T:
    """Read a JSON value by a model; raises `error_class` for the first thing wrong with it.

    `whole` is what the value is called where no field of it is to blame, e.g. "the file".
    """
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise error_class(_text(source, whole, first)) from None


def _text(source: str, whole: str, error: ErrorDetails) -> str:
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "missing":
        *owner, key = location
        layer, field = _layer_and_field(tuple(owner), whole)
        return missing_text(source, str(key), field, layer)
    layer, field = _layer_and_field(location, whole)
    if kind == _UNKNOWN_KEY:
        expected = f"one of {context['known']}" if context["known"] else "no key at all"
        return refusal_text(source, f"a key of {field}", context["key"], expected, layer)
    return refusal_text(source, field, error["input"], _words(kind, error["msg"], context), layer)


def _words(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        return str(context["expected"])
    return _WORDS.get(kind, message)


def _layer_and_field(location: _Location, whole: str) -> tuple[int | None, str]:
    """Split a place in a document into the layer it belongs to, if any, and a path of fields."""
    for prefix in _BY_LAYER:
        size = len(prefix)
        if location[:size] == prefix and len(location) > size:
            kept = () if prefix == ("layers",) else prefix
            return int(location[size]), _path((*kept, *location[size + 1 :])) or "the entry"
    return None, _path(location) or whole


def _path(location: _Location) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")
