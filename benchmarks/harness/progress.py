"""How far a benchmark is, on stderr, by tqdm; where that is no terminal, nothing is printed.

Without tqdm there are no bars: a GPU machine may have torch and triton only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None

__all__ = ["part_of", "say", "steps", "waiting"]

_T = TypeVar("_T")


def steps(things: Iterable[_T], what: str, total: int | None = None) -> Iterable[_T]:
    """Yield the things, and show how many have been done and how long the rest will take.

    `total` is their number where they do not tell.
    """
    if tqdm is None:
        return things
    done: Iterable[_T] = _bar(what, iterable=things, total=total)
    return done


def say(text: object) -> None:
    """Print a line to stdout in the middle of steps, without a bar in it."""
    if tqdm is None:
        print(text)
    else:
        tqdm.write(str(text))
    sys.stdout.flush()


@contextmanager
def part_of(total: float, what: str) -> Iterator[Callable[[float], object]]:
    """Show a bar; call what this yields with how much of `total` has just been done."""
    if tqdm is None:
        yield lambda part: None
        return
    with _bar(what, total=total, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield bar.update


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], object]]:
    """Show what is waited for and for how long; call what this yields from time to time."""
    if tqdm is None:
        yield lambda: None
        return
    with _bar(what, bar_format="{desc} {elapsed}") as bar:
        yield bar.refresh


def _bar(what: str, **options: Any) -> Any:
    return tqdm(desc=what, leave=False, disable=None, **options)
