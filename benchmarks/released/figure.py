"""What the figure of the released size shows, out of the recorded lines.

Lines of the machine and number of layers that were measured last, without compiling; of each
comparison the latest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Pair", "memory", "name_of", "of_one_size", "speeds"]

Line = dict[str, Any]

_NAMES = {
    "stock": "stock vLLM",
    "base": "all experts",
    "one": "one pool",
    "four": "four pools",
    "pruned": "four processes",
}


@dataclass(frozen=True)
class Pair:
    """Tokens/s of what emo-serve is compared with, and its own."""

    peer: str
    ours: str
    peer_rate: float
    our_rate: float
    ratio: float
    """The median over rounds, which is not the ratio of the medians."""


def of_one_size(*benchmarks: Sequence[Line]) -> list[list[Line]]:
    """Return each benchmark's lines, latest first, that go with the latest of the first."""

    def size(line: Line) -> tuple[object, object]:
        return line["device"], line["arguments"]["layers"]

    eager = [
        [line for line in lines if not line["arguments"].get("compiled")] for lines in benchmarks
    ]
    if not eager[0]:
        return [[] for _ in eager]
    latest = size(eager[0][0])
    return [[line for line in lines if size(line) == latest] for lines in eager]


def speeds(
    serving: Sequence[Line], pruned: Sequence[Line], llama_cpp: Sequence[Line]
) -> dict[str, list[Pair]]:
    """Return the pairs of each panel, by its title."""
    panels: dict[str, dict[tuple[str, str], Pair]] = {}
    for title, pair in [*_paired([*serving, *llama_cpp]), *_of_domains(pruned)]:
        panels.setdefault(title, {}).setdefault((pair.peer, pair.ours), pair)
    return {title: list(pairs.values()) for title, pairs in panels.items()}


def _paired(lines: Sequence[Line]) -> Iterator[tuple[str, Pair]]:
    for line in lines:
        for row in line["result"]["rows"]:
            if "a" not in row or row["b"].startswith("llama.cpp"):
                continue
            clients = row["clients"]
            title = f"{row['load']}, {clients} client" + ("s" if clients > 1 else "")
            ratio = row["ratio"]["median"] if isinstance(row["ratio"], dict) else row["ratio"]
            yield title, Pair(row["a"], row["b"], *row["tokens_per_second"], ratio)


def _of_domains(lines: Sequence[Line]) -> Iterator[tuple[str, Pair]]:
    for line in lines:
        for row in line["result"]["rows"]:
            title = f"decode, {sum(row['clients'])} clients, {row['traffic']} over four domains"
            ratio = row["ratio"]["median"]
            yield title, Pair("pruned", "four", *row["tokens_per_second"], ratio)


def memory(
    serving: Sequence[Line], pruned: Sequence[Line], llama_cpp: Sequence[Line]
) -> dict[str, float]:
    """Return GiB by kind of server, stock vLLM's first."""
    gib: dict[str, float] = {}
    for line in [*serving, *llama_cpp]:
        for kind, figures in line["result"]["servers"].items():
            if "own_gib" in figures:
                gib.setdefault(kind, figures["own_gib"])
    for line in pruned:
        gib.setdefault("pruned", line["result"]["gib"]["pruned"])
    order = [*_NAMES, *gib]
    return dict(sorted(gib.items(), key=lambda item: order.index(item[0])))


def name_of(kind: str) -> str:
    """Return what the figure calls a kind of server."""
    program, _, threads = kind.partition("-")
    if program == "llama.cpp" and threads:
        return f"{program}, {threads} thread" + ("s" if threads != "1" else "")
    base = kind.removesuffix("-spare")
    return _NAMES.get(base, base) + (", a core spared" if base != kind else "")
