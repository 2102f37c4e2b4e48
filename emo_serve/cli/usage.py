"""`emo-serve pools usage`: which experts of a pool a server's requests have taken, and how often.

For whoever asks how small a pool may be: an expert that is hardly taken in a layer can be cut
(`pools cut`). Part of `commands`, with its conventions; what is shown is the server's JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from emo_serve.cli.rendering.tables import columns, facts, grid, printable
from emo_serve.cli.server_flags import READ_SECONDS, add_server_flags, server_of
from emo_serve.errors import ConfigError

__all__ = ["add_usage_command"]

_USAGE = "Show how often a server's requests have taken each expert of a pool."
_LEGEND = (
    "experts across: # taken by every token, _ by none, . not in the pool;"
    " 0-9 tenths of the layer's most taken one but for #"
)
_NUM_LEAST = 10
_MOST_CHOICES = 0.99

_Command = Callable[[argparse.Namespace], int]


def add_usage_command(add: Callable[[str, _Command, str], argparse.ArgumentParser]) -> None:
    """Add the command by `add`, which takes a name, what to run, and a line of help."""
    usage = add("usage", _run_usage, _USAGE)
    usage.add_argument("name", metavar="NAME", help="a pool's name, or a union: math+code")
    usage.add_argument("--png", type=Path, metavar="FILE", help="draw a heat map; needs matplotlib")
    add_server_flags(usage, is_required=True, seconds=READ_SECONDS)


def _run_usage(arguments: argparse.Namespace) -> int:
    if arguments.png is not None:
        from emo_serve.cli.plots import require_matplotlib

        require_matplotlib()
    with server_of(arguments) as server:
        answer = server.usage(arguments.name)
    name, tokens = printable(answer["name"]), answer["tokens"]
    if not tokens:
        if arguments.png is not None:
            raise ConfigError(f"--png: no token was routed in pool {name} yet; nothing to draw")
        print(f"pool {name}: no token was routed in it since the engine started")
        return 0
    layers = [_Layer.of(index, entry, tokens) for index, entry in enumerate(answer["layers"])]
    print(_describe(name, answer, layers))
    if arguments.png is not None:
        from emo_serve.cli.plots import usage_png, write_picture

        write_picture(usage_png(name, [layer.shares for layer in layers]), arguments.png)
        print(f"drew {arguments.png}")
    return 0


@dataclass(frozen=True)
class _Layer:
    """One layer: for each expert of the model the share of tokens that took it.

    None for an expert that is not in the pool; a dense layer has no experts.
    """

    index: int
    shares: tuple[float | None, ...]

    @classmethod
    def of(cls, index: int, entry: dict[str, Any] | None, tokens: int) -> _Layer:
        if entry is None:
            return cls(index, ())
        counts = dict(zip(entry["experts"], entry["counts"], strict=True))
        known = (counts.get(expert) for expert in range(entry["num_experts"]))
        return cls(index, tuple(None if count is None else count / tokens for count in known))

    @property
    def in_pool(self) -> list[float]:
        return [share for share in self.shares if share is not None]

    @property
    def chosen(self) -> list[float]:
        """Return the shares of experts that not every token takes."""
        return [share for share in self.in_pool if share < 1]

    @property
    def num_needed(self) -> int:
        """Return how many experts get nearly all of the layer's choices."""
        totals = list(accumulate(sorted(self.in_pool, reverse=True)))
        return next(n for n, total in enumerate(totals, 1) if total >= _MOST_CHOICES * totals[-1])

    def marks(self) -> str:
        most = max(self.chosen, default=0.0)
        return "".join(_mark(share, most) for share in self.shares)


def _describe(name: str, answer: dict[str, Any], layers: Sequence[_Layer]) -> str:
    known = facts(
        {
            "pool": name,
            "tokens": f"{answer['tokens']} routed since the engine started",
            "hash": answer["content_hash"],
        }
    )
    header = ["LAYER", "EXPERTS", "LEAST TAKEN", "MEDIAN", "MOST TAKEN", "NEVER", "FOR 99 %"]
    rows = [header, *(_row(layer) for layer in layers if layer.shares)]
    return "\n".join(
        [
            known,
            "",
            columns(rows),
            "shares are of tokens, of a sample where many came at once; experts that every token"
            " takes aside; FOR 99 %: how many experts get 99 % of all choices",
            "",
            _LEGEND,
            grid([layer.marks() for layer in layers]),
            "",
            _least(layers),
        ]
    )


def _row(layer: _Layer) -> list[str]:
    row = [str(layer.index), str(len(layer.in_pool))]
    if layer.chosen:
        found = (min(layer.chosen), statistics.median(layer.chosen), max(layer.chosen))
        row += map(_percent, found)
    else:
        row += ["-"] * 3
    return [*row, str(layer.in_pool.count(0.0)), str(layer.num_needed)]


def _least(layers: Sequence[_Layer]) -> str:
    """Name the experts that are taken least, over all layers."""
    ranked = sorted(
        (share, layer.index, expert)
        for layer in layers
        for expert, share in enumerate(layer.shares)
        if share is not None and share < 1
    )
    if not ranked:
        return "every token takes every expert of the pool"
    rows = [["LEAST TAKEN", "LAYER", "EXPERT"]]
    rows += [[_percent(share), str(layer), str(e)] for share, layer, e in ranked[:_NUM_LEAST]]
    return columns(rows)


def _mark(share: float | None, most: float) -> str:
    if share is None:
        return "."
    if share >= 1:
        return "#"
    return str(min(9, int(10 * share / most))) if share else "_"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
