"""Flags made from the fields of a dataclass: name, default, help and reader stand in one place.

    @dataclass(frozen=True)
    class Settings:
        max_pools: int = flag("--max-pools", read_int, default=64, metavar="N", help="rows ...")

On the command line values stay text; `Flag.value` reads them, and raises ConfigError for bad ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from emo_serve.errors import ConfigError

__all__ = [
    "Flag",
    "flag",
    "flags_of",
    "read_int",
    "read_list",
    "read_path",
    "read_range",
    "read_seconds",
    "read_share",
    "read_switch",
    "read_text",
]


@dataclass(frozen=True)
class Flag:
    """How to set a field on the command line; `read` turns (flag, text) into its value.

    Without a `metavar` it takes no value: it sets its field to True.
    """

    name: str
    metavar: str | None
    read: Callable[[str, str], object]
    help: str
    dest: str
    default_text: str | None
    is_repeatable: bool

    def add_to(self, group: argparse._ArgumentGroup, default: object) -> None:
        """Add the flag to a parser's group; the help ends with the default, if there is one."""
        if self.metavar is None:
            group.add_argument(self.name, dest=self.dest, help=self.help, action="store_true")
            return
        options: dict[str, Any] = {"action": "append"} if self.is_repeatable else {}
        text = self.default_text or _as_text(default)
        group.add_argument(
            self.name,
            dest=self.dest,
            metavar=self.metavar,
            default=text,
            help=self.help if text is None else f"{self.help} (default: %(default)s)",
            **options,
        )

    def value(self, args: argparse.Namespace, default: object) -> object:
        """Return the value given on the command line, or else the default."""
        given = getattr(args, self.dest)
        if given is None:
            return default
        if self.metavar is None:
            return given
        if self.is_repeatable:
            return tuple(self.read(self.name, text) for text in given)
        return self.read(self.name, given)


def flag(
    name: str,
    read: Callable[[str, str], object],
    *,
    default: Any,
    metavar: str | None,
    help: str,
    dest: str | None = None,
    default_text: str | None = None,
    is_repeatable: bool = False,
) -> Any:
    """Return a dataclass field that is also a flag.

    `dest` is its name in argparse's namespace, and `default_text` how one would write the default;
    a repeatable flag makes a tuple.
    """
    dest = dest or name.removeprefix("--").replace("-", "_")
    metadata = {"flag": Flag(name, metavar, read, help, dest, default_text, is_repeatable)}
    return field(default=default, metadata=metadata)


def _as_text(default: object) -> str | None:
    """Return a default as written on the command line; None if there is none."""
    if not default:
        return None
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


# -- readers: from a flag's name and text to its value --


def read_text(flag: str, text: str) -> str:
    """Return the text itself."""
    return text


def read_path(flag: str, text: str) -> Path:
    """Return a path; whether it exists is checked by its user."""
    return Path(text)


def read_list(flag: str, text: str) -> tuple[str, ...]:
    """Return the parts between commas, empty ones left out."""
    return tuple(filter(None, text.split(",")))


def read_int(flag: str, text: str) -> int:
    """Return a whole number; raises ConfigError."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a whole number") from None


def read_seconds(flag: str, text: str) -> float:
    """Return a number of seconds; raises ConfigError."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a number of seconds") from None


def read_share(flag: str, text: str) -> float:
    """Return a number meant to lie between 0 and 1; raises ConfigError."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a number from 0 to 1") from None


def read_range(flag: str, text: str) -> tuple[float, float]:
    """Return the two numbers around a comma, the lower first; raises ConfigError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give two numbers, such as 0.5,2") from None
    return low, high


def read_switch(flag: str, text: str) -> bool:
    """Return True: the flag of a switch takes no text."""
    return True


def flags_of(kind: type[Any]) -> list[tuple[str, Flag, object]]:
    """Return name, flag and default of every field of a dataclass that is a flag, in order."""
    return [
        (entry.name, entry.metadata["flag"], entry.default)
        for entry in fields(kind)
        if "flag" in entry.metadata
    ]
