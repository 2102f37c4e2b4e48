"""Bounds on what a pool may hold, so that everything downstream can hold, store and show it.

A router temperature becomes a float32 that logits are divided by; ids index tables; texts go into
files, JSON answers and terminals. What does not survive that is refused where it is read, with its
place and value, so that one bad file costs one pool and not the server.
"""

from __future__ import annotations

import unicodedata

from emo_serve.pools.strict_json import refusal, required_real

__all__ = [
    "HIGHEST_TEMPERATURE",
    "LOWEST_TEMPERATURE",
    "MOST_COUNT",
    "MOST_EXPERTS",
    "MOST_LAYERS",
    "TEMPERATURE_RULE",
    "check_temperature",
    "check_text",
    "storable",
    "text_fault",
]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-30, 1e30
"""Logits up to 1e8 divided by the one, and gates divided by the other, are still float32's."""

TEMPERATURE_RULE = (
    f"a finite number above 0, from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}"
)
MOST_LAYERS = 4096
MOST_EXPERTS = 2**16
"""Per layer; ids are below it."""

MOST_COUNT = 2**63 - 1

_MOST_LETTERS = {"description": 10_000}
_MOST_LETTERS_ELSEWHERE = 1_000


def check_temperature(source: str, value: object) -> float:
    """Return the number that divides the gate's logits, or raise PoolFileError."""
    temperature = required_real(source, "router_temperature", value, TEMPERATURE_RULE)
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise refusal(source, "router_temperature", value, TEMPERATURE_RULE)
    return temperature


def check_text(source: str, field: str, text: str | None) -> None:
    """Raise PoolFileError for a text that a file, an answer or a terminal cannot hold."""
    fault = None if text is None else text_fault(field, text)
    if fault is not None:
        raise refusal(source, field, text, fault)


def text_fault(field: str, text: str) -> str | None:
    """Return what was expected of a text that breaks the rule of its field, else None."""
    most = _MOST_LETTERS.get(field, _MOST_LETTERS_ELSEWHERE)
    if len(text) > most:
        return f"at most {most} characters, not {len(text)}"
    allowed = "\n\t" if field == "description" else ""
    if not all(letter in allowed or _is_kept(letter) for letter in text):
        return "text without control characters and lone surrogates"
    return None


def storable(text: str) -> str:
    """Return a name found elsewhere, such as a directory's, as a pool may hold it."""
    kept = "".join(letter if _is_kept(letter) else "?" for letter in text)
    return kept[:_MOST_LETTERS_ELSEWHERE]


def _is_kept(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cs")
