"""What a misspelt flag, pool or command was probably meant to be."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["closest", "did_you_mean", "meant_flags", "unrecognized"]

_LIKENESS = 0.6
"""Of two words, as `difflib` measures it: one wrong letter of four passes, two do not."""
_LONGEST = 80


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like a given one; None if none is alike."""
    found = get_close_matches(word[:_LONGEST], list(known), n=1, cutoff=_LIKENESS)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return what follows a word in an error, ` (did you mean 'math'?)`, or "" if none is alike."""
    found = closest(word, known)
    return "" if found is None else f" (did you mean {found!r}?)"


def meant_flags(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Return what follows unknown arguments in an error, or "" if no flag is alike.

    `known` are the flags that there are, short ones included.
    """
    bare = {flag.lstrip("-"): flag for flag in known if flag.startswith("--")}
    names = (argument.partition("=")[0] for argument in unknown if argument.startswith("-"))
    words = (closest(name.lstrip("-").replace("_", "-"), bare) for name in names)
    found = dict.fromkeys(bare[word] for word in words if word is not None)
    return f" (did you mean {' '.join(found)}?)" if found else ""


def unrecognized(unknown: Sequence[str], actions: Iterable[argparse.Action]) -> str:
    """Return the error for unknown arguments of a parser that has these actions."""
    known = [option for action in actions for option in action.option_strings]
    return f"unrecognized arguments: {' '.join(unknown)}{meant_flags(unknown, known)}"
