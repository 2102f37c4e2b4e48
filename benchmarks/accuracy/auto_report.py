"""The tables of `accuracy/auto.py`: each model's latest figures, and the vote against each alone.

The interval is that of the mean difference prompt by prompt, 95 %, from drawing the prompts again
10,000 times: most differences are zero and a few are large, so a standard error would mislead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

__all__ = ["against", "interval", "report"]

_DRAWS = 10_000


def report(directory: Path) -> list[str]:
    """Return each model's latest tables, each method as it was last measured on the same texts."""
    path = directory / "auto.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    written: dict[str, dict[tuple[Any, ...], Mapping[str, Any]]] = {}
    about: dict[str, str] = {}
    of: dict[str, tuple[Any, ...]] = {}
    for line in map(json.loads, lines):
        result = line["result"]
        if "rows" not in result:
            continue
        name = result["model"]
        alike = tuple(result[key] for key in ("domains", "experts", "texts", "follow"))
        if of.setdefault(name, alike) != alike:  # of other texts: not to be compared
            rows.pop(name, None)
            written.pop(name, None)
        of[name] = alike
        about[name] = (
            f"{name}: {result['domains']} pools of {result['experts']}, {result['texts']} texts,"
            f" loss over {result['follow']} tokens; {line['device'][0]}, {line['date'][:10]}"
        )
        rows.setdefault(name, {}).update({_place(row): row for row in result["rows"]})
        of_model = written.setdefault(name, {})
        of_model.update({_place(row): row for row in result.get("written", ())})
    told: list[str] = []
    for name, text in about.items():
        told += ["", text, "", _HEAD, "|---" * 12 + "|"]
        told += [_line_of(rows[name][place]) for place in sorted(rows[name])]
        if written[name]:
            told += ["", _WRITTEN_HEAD, "|---" * 7 + "|"]
            told += [_written_line(written[name][place]) for place in sorted(written[name])]
            told += ["", _MISSES_HEAD, "|---" * 7 + "|", *_misses(written[name])]
        compared = [*against(rows[name], ""), *against(written[name], "following_")]
        compared += against(written[name], "of_prompt_")
        if compared:
            told += ["", _AGAINST_HEAD, "|---" * 7 + "|", *compared]
    return told


def against(rows: Mapping[tuple[Any, ...], Mapping[str, Any]], kind: str) -> list[str]:
    """Return a line per base, length and other method: the vote's loss minus the other's."""
    key, told = f"{kind}above_own_by_text", []
    for place in sorted(rows):
        *at, method = place
        vote = rows.get((*at, "vote"))
        if method == "vote" or vote is None or not (key in vote and key in rows[place]):
            continue
        pairs = zip(vote[key], rows[place][key], strict=True)
        differences = [mine - other for mine, other in pairs]
        low, high = interval(differences)
        told.append(
            f"| {vote['base']} | {vote.get('tokens', _OF_WRITTEN[kind])} | {method}"
            f" | {mean(differences):+.3f} | {low:+.3f} to {high:+.3f}"
            f" | {sum(d < 0 for d in differences)} | {sum(d > 0 for d in differences)} |"
        )
    return told


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by drawing again."""
    values = np.asarray(differences)
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


_HEAD = (
    "| base pool | tokens | method | right | to base | loss | own pool's | base's"
    " | above own | added ms p50 | p90 | named ms |"
)
_WRITTEN_HEAD = (
    "| base pool | method | of prompts by hand, right | to base | right or no more loss"
    " | loss above own | worst domain |"
)
_MISSES_HEAD = (
    "| base pool | domain | right | the vote's misses go to | loss above own | of them lower"
    " | of the prompt itself |"
)
_AGAINST_HEAD = "| base pool | tokens | vote minus | loss | 95 % | lower | higher |"
_OF_WRITTEN = {"": "", "following_": "after by hand", "of_prompt_": "by hand"}


def _written_line(row: Mapping[str, Any]) -> str:
    worst = min(row["by_domain"], key=row["by_domain"].__getitem__)
    above = row.get("following_above_own_by_text")  # older lines have none
    losses = "" if above is None else f"{mean(d <= 0 for d in above):.3f} | {mean(above):+.3f}"
    return (
        f"| {row['base']} | {row['method']} | {row['right']:.3f} | {row['to_base']:.3f}"
        f" | {losses or ' | '} | {worst} {row['by_domain'][worst]:.2f} |"
    )


def _misses(rows: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[str]:
    """Return a line per base and domain of what the vote's misses cost."""
    told: list[str] = []
    for place in sorted(rows):
        row = rows[place]
        for name, went in row.get("misses", {}).items() if row["method"] == "vote" else ():
            after, itself = (row[f"{key}_of_misses"][name] for key in ("following", "of_prompt"))
            if went:
                most = sorted(went.items(), key=lambda pair: -pair[1])
                told.append(
                    f"| {row['base']} | {name} | {row['by_domain'][name]:.2f}"
                    f" | {', '.join(f'{pool} {count}' for pool, count in most)}"
                    f" | {mean(after):+.2f} | {sum(d < 0 for d in after)} of {len(after)}"
                    f" | {mean(itself):+.2f} |"
                )
    return told


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["base"] != "resident", row.get("tokens", 0), row["method"]


def _line_of(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['base']} | {row['tokens']} | {row['method']} | {row['right']:.3f}"
        f" | {row['to_base']:.3f} | {row['loss']:.3f} | {row['own_loss']:.3f}"
        f" | {row['base_loss']:.3f} | {row['above_own']:+.3f} +- {row['above_own_error']:.3f}"
        f" | {row['added_ms_p50']:.1f} | {row['added_ms_p90']:.1f} | {row['named_ms_p50']:.1f} |"
    )
