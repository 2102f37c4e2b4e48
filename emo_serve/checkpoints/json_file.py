"""Read the JSON files beside a checkpoint's weights, and show their values in one line."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from emo_serve.errors import ConfigError

__all__ = ["read_object", "refuse_value", "shown"]

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 6


def shown(value: object) -> str:
    """Return a value as it stands in an error: one line of ASCII, long ones shortened."""
    return _repr.repr(value).encode("ascii", "backslashreplace").decode()


def refuse_value(
    path: Path, field: str, value: object, expected: str, error_class: type[ConfigError]
) -> ConfigError:
    """Build the error for one bad value of a file."""
    return error_class(f"{path}: {field} is {shown(value)}; expected {expected}")


def read_object(path: Path, error_class: type[ConfigError] = ConfigError) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises `error_class` naming the file and why not.

    A byte order mark is skipped. FileNotFoundError is raised as it is.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UTF-8's and JSON's errors are ValueErrors
        raise error_class(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise refuse_value(path, "the file", value, "a JSON object", error_class)
    return value
