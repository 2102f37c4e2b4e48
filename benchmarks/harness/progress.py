"""How far a benchmark is, on stderr, by tqdm; where that is no terminal, nothing is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

__all__ = ["say", "steps", "waiting"]

_T = TypeVar("_T")


def steps(things: Iterable[_T], what: str) -> Iterable[_T]:
    """Yield the things, and show how many have been done and how long the rest will take."""
    done: Iterable[_T] = tqdm(things, desc=what, leave=False, disable=None)
    return done


def say(text: object) -> None:
    """Print a line to stdout in the middle of steps, without a bar in it."""
    tqdm.write(str(text))
    sys.stdout.flush()


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], object]]:
    """Show what is waited for and for how long; call what this yields from time to time."""
    form = "{desc} {elapsed}"
    with tqdm(desc=what, bar_format=form, leave=False, disable=None) as bar:
        yield bar.refresh
