"""Progress bars on stderr, by tqdm; where that is no terminal, nothing is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress_of", "progress_of_bytes", "steps_of"]

_FORM = "{l_bar}{bar}| {elapsed}<{remaining}"


@contextmanager
def steps_of(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of so many steps; call what this yields with the number of steps just made."""
    with _bar(text, total=total, bar_format=_FORM) as bar:
        yield bar.update


@contextmanager
def progress_of(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar; call what this yields with what is done so far, and the total."""
    with _bar(text, bar_format=_FORM) as bar:
        yield _teller(bar)


@contextmanager
def progress_of_bytes(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show the same of bytes, and how many come per second."""
    with _bar(text, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield _teller(bar)


def _bar(text: str, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(desc=text, leave=False, disable=None, **options)


def _teller(bar: Any) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return tell
