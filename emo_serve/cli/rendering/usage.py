"""How often a pool's experts were taken, as text. Input is the JSON of /v1/pools/{name}/usage."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from emo_serve.cli.rendering.tables import columns, facts, grid, printable

__all__ = ["LayerShares", "describe_usage", "layers_of"]

_LEGEND = (
    "experts across: # taken by every token, _ by none, . not in the pool,"
    " 0-9 tenths of the layer's most taken one, # aside"
)
_NUM_LEAST = 10
_MOST_CHOICES = 0.99


@dataclass(frozen=True)
class LayerShares:
    """One layer: for each expert of the model, the share of tokens that took it.

    None stands for an expert outside the pool; a dense layer has no experts.
    """

    index: int
    shares: tuple[float | None, ...]

    @classmethod
    def of(cls, index: int, entry: dict[str, Any] | None, tokens: int) -> LayerShares:
        """Read one entry of the answer; None is a dense layer."""
        if entry is None:
            return cls(index, ())
        counts = dict(zip(entry["experts"], entry["counts"], strict=True))
        known = (counts.get(expert) for expert in range(entry["num_experts"]))
        return cls(index, tuple(None if count is None else count / tokens for count in known))

    @property
    def in_pool(self) -> list[float]:
        """Return the shares of the pool's experts."""
        return [share for share in self.shares if share is not None]

    @property
    def chosen(self) -> list[float]:
        """Return the shares of the experts that some token did not take."""
        return [share for share in self.in_pool if share < 1]

    @property
    def num_needed(self) -> int:
        """Return how many experts get 99 % of the layer's choices."""
        totals = list(accumulate(sorted(self.in_pool, reverse=True)))
        return next(n for n, total in enumerate(totals, 1) if total >= _MOST_CHOICES * totals[-1])

    def marks(self) -> str:
        """Return one mark per expert of the model, as the legend explains them."""
        most = max(self.chosen, default=0.0)
        return "".join(_mark(share, most) for share in self.shares)


def layers_of(answer: dict[str, Any]) -> list[LayerShares]:
    """Return the layers of an answer about a pool in which tokens were routed."""
    tokens = answer["tokens"]
    return [LayerShares.of(index, entry, tokens) for index, entry in enumerate(answer["layers"])]


def describe_usage(answer: dict[str, Any], layers: Sequence[LayerShares]) -> str:
    """Lay out what the layers' experts did, with a map and the least taken ones."""
    known = facts(
        {
            "pool": printable(answer["name"]),
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
            "shares are of tokens, sampled where many were routed at once, and leave out experts"
            " that every token takes; FOR 99 %: how many experts get 99 % of all choices",
            "",
            _LEGEND,
            grid([layer.marks() for layer in layers]),
            "",
            _least(layers),
        ]
    )


def _row(layer: LayerShares) -> list[str]:
    row = [str(layer.index), str(len(layer.in_pool))]
    if layer.chosen:
        found = (min(layer.chosen), statistics.median(layer.chosen), max(layer.chosen))
        row += map(_percent, found)
    else:
        row += ["-"] * 3
    return [*row, str(layer.in_pool.count(0.0)), str(layer.num_needed)]


def _least(layers: Sequence[LayerShares]) -> str:
    """List the least taken experts of all layers."""
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
