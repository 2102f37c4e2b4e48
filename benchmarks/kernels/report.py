"""The report: a table for each pool and kind of weights, and which targets were reached.

Works on rows of kernels/measure.py alone, fresh or from the results file. Nothing is asserted: a
target that is not reached is a line of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Target", "print_report", "targets"]

Row = dict[str, Any]
_COLUMNS = (
    "us (quartiles)",
    "bandwidth, % (weights alone)",
    "dense rate, %",
    "route + dispatch, %",
)


@dataclass(frozen=True)
class Target:
    """A target and what was measured; `reached` is None where nothing was."""

    name: str
    reached: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[self.reached]
        return f"{self.name}: {verdict}{f' ({self.found})' if self.found else ''}"


def print_report(rows: Sequence[Row], judged: bool = True) -> None:
    """Print the tables, then the targets, which are not judged on an interpreter's rows."""
    for weights, pool in dict.fromkeys((row["weights"], row["pool"]) for row in rows):
        mine = [row for row in rows if (row["weights"], row["pool"]) == (weights, pool)]
        names = list(dict.fromkeys(name for row in mine for name in row["baselines"]))
        columns = [f"{weights} weights, pool {pool}: T", *_COLUMNS, *(f"x {n}" for n in names)]
        print(f"\n| {' | '.join(columns)} |")
        print("|---" * len(columns) + "|")
        for row in sorted(mine, key=lambda row: row["tokens"]):
            print(f"| {row['tokens']} | {' | '.join(_cells(row, names))} |")
    if not judged:
        print("\nTargets: not judged; this was the interpreter, whose times mean nothing")
        return
    print("\nTargets:")
    for target in targets(rows):
        print(f"- {target}")


def _cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    layer = row["layer"]
    how = "" if layer["how"] == "graph" else f" {layer['how']}"
    yield f"{layer['median_us']:.1f} ({layer['q1_us']:.1f}-{layer['q3_us']:.1f}){how}"
    yield f"{100 * row['bandwidth_share']:.0f} ({100 * row['weights_bandwidth_share']:.0f})"
    yield f"{100 * row['dense_share']:.0f}"
    yield f"{100 * row['route_dispatch_share']:.0f}"
    for name in names:
        yield f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Compare the rows of 16bit weights with the targets of the kernels."""
    rows = [row for row in rows if row["weights"] == "16bit"]
    decode = [row for row in rows if row["pool"] in ("16", "32")]
    return [
        _bandwidth("T 8-256, pool of 16 or 32: 80 % of copy bandwidth", 0.8, decode, (8, 256)),
        _bandwidth("T 1, pool of 16 or 32: 50 % of copy bandwidth", 0.5, decode, (1, 1)),
        _worst(
            "T >= 4096: 60 % of the dense rate",
            [row for row in rows if row["tokens"] >= 4096],
            lambda row: row["dense_share"],
            at_least=0.6,
        ),
        *_against_vllm(rows),
        _pool_of_16(rows),
        _worst(
            "T 1-256: route + dispatch within 10 % of the layer",
            [row for row in rows if row["tokens"] <= 256],
            lambda row: row["route_dispatch_share"],
            at_most=0.1,
        ),
    ]


def _bandwidth(name: str, least: float, rows: Sequence[Row], span: tuple[int, int]) -> Target:
    mine = [row for row in rows if span[0] <= row["tokens"] <= span[1]]
    target = _worst(name, mine, lambda row: row["bandwidth_share"], at_least=least)
    if not mine:
        return target
    alone = min(row["weights_bandwidth_share"] for row in mine)
    return Target(name, target.reached, f"{target.found}; counting weights alone {alone:.2f}")


def _against_vllm(rows: Sequence[Row]) -> Iterator[Target]:
    # Where only vLLM's two launches could run, that is said and they are what is compared with.
    for baseline in ("vllm", "vllm-products"):
        mine = [row for row in rows if baseline in row["ratios"]]
        if mine or baseline == "vllm-products":
            break

    def ratio(row: Row) -> float:
        return float(row["ratios"][baseline])

    of = "vLLM" if baseline == "vllm" or not mine else "vLLM's two products alone"
    yield _worst(f"never slower than 0.95 x {of}", mine, ratio, at_least=0.95)
    name = f"1.2 x {of} in the median"
    if not mine:
        yield Target(name, None, "")
        return
    middle = median(ratio(row) for row in mine)
    yield Target(name, middle >= 1.2, f"{middle:.2f} over {len(mine)} shapes")


def _pool_of_16(rows: Sequence[Row]) -> Target:
    name = "T 64: pool of 16 within 0.25 x the time of 128 experts"
    times = {row["pool"]: row["layer"]["median_us"] for row in rows if row["tokens"] == 64}
    if not {"16", "128"} <= times.keys():
        return Target(name, None, "")
    ratio = times["16"] / times["128"]
    return Target(name, ratio <= 0.25, f"{ratio:.3f}")


def _worst(
    name: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    at_least: float | None = None,
    at_most: float | None = None,
) -> Target:
    if not rows:
        return Target(name, None, "")
    worst = min(rows, key=value) if at_most is None else max(rows, key=value)
    found = value(worst)
    reached = found >= at_least if at_least is not None else found <= (at_most or 0.0)
    where = f"worst {found:.2f}, at T {worst['tokens']} with pool {worst['pool']}"
    return Target(name, reached, f"{where}, of {len(rows)} shapes")
