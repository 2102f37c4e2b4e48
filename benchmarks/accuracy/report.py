"""Tables of the memory-accuracy benchmark, from its results file alone.

Each role's latest model counts, by its latest line of each training seed. The paper's Table 3
stands beside ours: another model of another size, other data and other tasks, so compare only the
shapes of the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness.results import RESULTS

__all__ = ["PAPER", "ROLES", "headline", "latest", "of_seeds", "print_report"]

ROLES = ("EMO", "standard MoE")
Row = dict[str, Any]

PAPER: dict[float, tuple[object, ...]] = {
    100: (128, 27.1, 42.8, 42.4, 18.5, 19.3, 12.0, 13.9),
    50: (64, 14.3, 42.5, 39.4, 18.2, 16.8, 11.0, 4.9),
    25: (32, 7.8, 41.4, 30.8, 17.6, 13.2, 11.7, 2.9),
    12.5: (16, 4.6, 39.9, 24.6, 16.6, 9.9, 12.2, 2.4),
    6.25: (8, 3.0, 36.1, 22.7, 14.7, 9.5, 6.9, 2.3),
}
"""Share kept in % -> k of 128, GB in bf16 (computed from the geometry), then in % EMO and standard
MoE on MMLU, MMLU-Pro, GSM8K: arXiv 2605.06663, Table 3, as served, without fine-tuning. The
standard MoE's are read off a figure."""


def of_seeds(directory: Path = RESULTS) -> dict[str, dict[int, Row]]:
    """Return the results of each role by training seed, in order.

    For each seed that is the latest result of the same model on the same texts as the role's latest
    result of all.
    """
    found: dict[str, dict[int, Row]] = {}
    for result in _results(directory)[::-1]:
        if "role" in result:
            seeds = found.setdefault(result["role"], {})
            if all(_measured(result) == _measured(other) for other in seeds.values()):
                seeds.setdefault(result.get("training_seed", 0), result)
    return {role: dict(sorted(seeds.items())) for role, seeds in found.items()}


def _measured(result: Row) -> list[Any]:
    keys = ("model", "dtype", "measured_texts", "measured_tokens", "questions")
    return [*(result.get(key) for key in keys), set(result["rows"][0].get("domains", ()))]


def latest(directory: Path = RESULTS) -> dict[str, Row]:
    """Return each role's result of the first seed that all have, and the latest sweep as "speeds".

    Roles without results are left out. Without a common seed it is each role's first.
    """
    models = of_seeds(directory)
    common = set[int]().union(*models.values()).intersection(*models.values())
    found = {role: seeds[min(common or seeds)] for role, seeds in models.items()}
    for result in _results(directory):
        if "role" not in result:
            found["speeds"] = result
    return found


def _results(directory: Path) -> list[Row]:
    path = directory / "memory_accuracy.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["result"] for line in lines]


def headline(result: Row) -> dict[int, Row]:
    """Return the row of each size by the run's first method and number of examples."""
    rows: dict[int, Row] = {}
    for row in result["rows"]:
        if row["temperature"] == 1:
            rows.setdefault(row["k"], row)
    return dict(sorted(rows.items(), reverse=True))


def print_report(directory: Path = RESULTS) -> None:
    """Print every table that has results, as Markdown."""
    found = latest(directory)
    results = {role: found[role] for role in ROLES if role in found}
    if results:
        print("\n".join(_size_table(results)))
        print("\n".join(_seed_table(of_seeds(directory))))
        print("\n".join(_method_table(results)))
        print("\n".join(_temperature_table(results)))
    if "speeds" in found:
        print("\n".join(_speed_table(found["speeds"])))


def _size_table(results: dict[str, Row]) -> list[str]:
    first = next(iter(results.values()))
    largest = max(headline(first))
    gib = {row["k"]: row["gib"] for row in first["memory"]}
    ours = [
        f"{role} {figure}" for role in results for figure in ("loss", "next token", "questions")
    ]
    tasks = ("MMLU", "Pro", "GSM8K")
    theirs = [f"*{role} {task}*" for task in tasks for role in ("EMO", "Std")]
    lines = [
        "",
        "Left: ours. Right, in italics: the paper's Table 3, ANOTHER MODEL (1B active, 14B in all)"
        " and OTHER TASKS; compare shapes, not figures.",
        "",
        _line("kept", f"of {largest}", "GiB", *ours, "*of 128*", "*GB*", *theirs),
        _rule(5 + len(ours) + len(theirs)),
    ]
    for k, row in headline(first).items():
        share = 100 * k / largest
        name = "shared only" if row["method"] == "trunk" else f"{share:g} %"
        cells = [cell for result in results.values() for cell in _figures(headline(result), k)]
        paper = [f"*{value}*" for value in PAPER.get(share, ())] if name != "shared only" else []
        paper = paper or [""] * (2 + len(theirs))
        lines.append(_line(name, k, f"{gib[k]:.4f}" if k in gib else "", *cells, *paper))
    texts, questions = first["measured_texts"], first["questions"]
    seeds = dict.fromkeys(str(result.get("training_seed", 0)) for result in results.values())
    note = (
        f"Training seed {', '.join(seeds)}. {texts} texts, {first['measured_tokens']} tokens,"
        f" {questions} questions; all domains weighted equally. In brackets: against all experts,"
        " with its standard error over texts."
    )
    return [*lines, "", note]


def _figures(rows: dict[int, Row], k: int) -> list[str]:
    row, full = rows.get(k), next(iter(rows.values()))
    if row is None:
        return ["", "", ""]
    loss = f"{row['loss']:.3f}"
    if row is not full:
        error = row["loss_difference_standard_error"]
        loss += f" ({row['loss'] - full['loss']:+.3f} +-{error:.3f})"
    choices = f"{100 * row['choices']:.1f} %" if "choices" in row else ""
    return [loss, f"{100 * row['accuracy']:.1f} %", choices]


def _seed_table(models: dict[str, dict[int, Row]]) -> list[str]:
    if all(len(seeds) == 1 for seeds in models.values()):
        return []
    figures = ("loss", "against all experts", "questions")
    lines = [
        "",
        "Means over training seeds, in brackets their range:",
        "",
        _line("kept", *(f"{role} {figure}" for role in models for figure in figures)),
        _rule(1 + len(figures) * len(models)),
    ]
    by_role = [[headline(result) for result in seeds.values()] for seeds in models.values()]
    sizes = {k for headlines in by_role for rows in headlines for k in rows}
    for k in sorted(sizes, reverse=True):
        cells: list[str] = []
        for headlines in by_role:
            rows = [rows for rows in headlines if k in rows]
            full = [next(iter(each.values()))["loss"] for each in rows]
            losses = [each[k]["loss"] for each in rows]
            changes = [loss - whole for loss, whole in zip(losses, full, strict=True)]
            questions = [100 * each[k]["choices"] for each in rows if "choices" in each[k]]
            cells += [_spread(losses), _spread(changes, "+.3f"), _spread(questions, ".1f")]
        lines.append(_line(k, *cells))
    seeds = "; ".join(f"{role}: {', '.join(map(str, seeds))}" for role, seeds in models.items())
    return [*lines, "", f"Training seeds of {seeds}."]


def _method_table(results: dict[str, Row]) -> list[str]:
    sizes = sorted({row["k"] for result in results.values() for row in _found(result)})[::-1]
    columns = [(role, k) for role in results for k in sizes]
    lines = [
        "",
        "Loss by method and examples; in brackets the range over draws:",
        "",
        _line("method, examples", *(f"{role}, {k}" for role, k in columns)),
        _rule(1 + len(columns)),
    ]
    kinds = dict.fromkeys(
        (row["method"], row["examples"]) for r in results.values() for row in _found(r)
    )
    for method, examples in kinds:
        cells = [
            _spread(
                row["loss"]
                for row in _found(results[role])
                if (row["method"], row["examples"], row["k"]) == (method, examples, k)
            )
            for role, k in columns
        ]
        name = method if method == "random" else f"{method}, {examples or 'all'}"
        lines.append(_line(name, *cells))
    return lines


def _found(result: Row) -> list[Row]:
    """Return the rows whose pools a method found."""
    return [
        row
        for row in result["rows"]
        if row["temperature"] == 1 and row["method"] not in ("full", "trunk")
    ]


def _spread(values: Iterable[float], form: str = ".3f") -> str:
    listed = list(values)
    if len(listed) < 2:
        return "".join(format(value, form) for value in listed)
    low, high = min(listed), max(listed)
    return f"{mean(listed):{form}} ({low:{form}} to {high:{form}})"


def _temperature_table(results: dict[str, Row]) -> list[str]:
    temperatures = sorted({row["temperature"] for r in results.values() for row in r["rows"]})
    if len(temperatures) == 1:
        return []
    lines = [
        "",
        "Loss by router temperature:",
        "",
        _line("model, kept", *(f"{value:g}" for value in temperatures)),
        _rule(1 + len(temperatures)),
    ]
    for role, result in results.items():
        for k, first in headline(result).items():
            same = {
                row["temperature"]: f"{row['loss']:.3f}"
                for row in result["rows"]
                if all(row[key] == first[key] for key in ("k", "method", "examples", "seed"))
            }
            if len(same) > 1:
                cells = (same.get(value, "") for value in temperatures)
                lines.append(_line(f"{role}, {k}", *cells))
    return lines


def _speed_table(result: Row) -> list[str]:
    lines = [
        "",
        f"Speed of {result['model']}, {len(result['domains'])} pools mixed; load average"
        f" {result['load_average']['lowest']:.1f} to {result['load_average']['highest']:.1f}:",
        "",
        _line("clients", "tokens/s (range)", "gap ms", "TTFT ms"),
        _rule(4),
    ]
    for row in result["speeds"]:
        low, high = row["tokens_per_second_range"]
        count = row["concurrency"]
        name = f"**{count}**" if count == result["sweet_spot"] else count
        rate = f"{row['tokens_per_second']:.0f} ({low:.0f}-{high:.0f})"
        lines.append(_line(name, rate, f"{row['gap_ms']:.1f}", f"{row['ttft_ms']:.0f}"))
    return [*lines, "", "Bold: the sweet spot, the most tokens/s for each ms of gap."]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
