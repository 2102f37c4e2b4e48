"""Pools as text: tables in columns, and maps with layers down and experts across."""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.facts import MoeLayer
from emo_serve.pools.pool import ExpertPool

__all__ = [
    "columns",
    "describe_pool",
    "expert_map",
    "facts",
    "grid",
    "pool_table",
    "printable",
    "size_range",
]

_HASH_CHARS = 12


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells, including the header, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def facts(pairs: dict[str, str | None]) -> str:
    """Lay out one fact per line; those without a value are left out."""
    return "\n".join(f"{key:<12} {value}" for key, value in pairs.items() if value)


def grid(rows: Sequence[str]) -> str:
    """Draw one string of marks per layer below a ruler; an empty one is a dense layer."""
    labels = [f"layer {index}" for index in range(len(rows))]
    margin = max(map(len, labels), default=0) + 2
    ruler = "".join(str(start).ljust(8) for start in range(0, max(map(len, rows), default=0), 8))
    lines = [" " * margin + ruler.rstrip()]
    lines += [
        label.ljust(margin) + (row or "dense") for label, row in zip(labels, rows, strict=True)
    ]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return foreign text with `?` in place of terminal control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def size_range(sizes: Sequence[int]) -> str:
    """Return "16", or "12-20" where the sizes differ."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    return str(low) if low == high else f"{low}-{high}"


# -- of pool files --


def pool_table(pools: Sequence[ExpertPool], expert_bytes: int | None = None) -> str:
    """Lay out one pool per row; the size column needs the bytes of one expert."""
    header = ["POOL", "EXPERTS/LAYER", "TOTAL", "TEMPERATURE", "CALIBRATION", "HASH"]
    if expert_bytes is not None:
        header.insert(3, "MIB")
    rows = [header]
    for pool in pools:
        total = sum(map(len, pool.expert_ids))
        default = f" (default {pool.default_experts})" if pool.default_experts else ""
        row = [
            pool.name,
            f"{_per_layer(pool)}{default}",
            str(total),
            f"{pool.router_temperature:g}",
        ]
        row += [_calibration(pool), pool.content_hash[:_HASH_CHARS]]
        if expert_bytes is not None:
            row.insert(3, f"{total * expert_bytes / 2**20:.1f}")
        rows.append(row)
    return columns(rows)


def expert_map(pool: ExpertPool, moe_layers: Sequence[MoeLayer | None] | None = None) -> str:
    """Draw layers down, experts across: `#` in the pool, `+` in every pool, `.` not in it.

    Without the model, the number of experts comes from the scores, or else from the highest id.
    """
    rows: list[str] = []
    for index in range(len(pool.layers)):
        model_layer = moe_layers[index] if moe_layers is not None else None
        implied = model_layer.implied if model_layer is not None else frozenset()
        inside = set(pool.expert_ids[index])
        marks = (
            "." if expert not in inside else "+" if expert in implied else "#"
            for expert in range(_num_experts(pool, index, moe_layers))
        )
        rows.append("" if pool.layers[index] is None else "".join(marks))
    return grid(rows)


def describe_pool(
    pool: ExpertPool,
    moe_layers: Sequence[MoeLayer | None] | None = None,
    expert_bytes: int | None = None,
) -> str:
    """Describe one pool with a map; given the model, also its size and implied experts."""
    total = sum(map(len, pool.expert_ids))
    size = f", {total * expert_bytes / 2**20:.1f} MiB" if expert_bytes else ""
    described = facts(
        {
            "pool": pool.name,
            "description": printable(" ".join(pool.description.split())),
            "experts": f"{_per_layer(pool)} per layer, {total} in all{size}",
            "scores": "of all experts; can be cut to any size" if pool.has_scores else "none",
            "served at": f"{k} per layer by default" if (k := pool.default_experts) else None,
            "temperature": f"{pool.router_temperature:g}",
            "made for": printable(pool.model.name or pool.model.fingerprint or "")
            if pool.model
            else None,
            "calibration": _calibration(pool),
            "hash": pool.content_hash,
        }
    )
    legend = "experts across: # in the pool" + (", + in every pool" if moe_layers else "")
    return "\n".join([described, "", legend, expert_map(pool, moe_layers)])


def _num_experts(pool: ExpertPool, index: int, moe_layers: Sequence[MoeLayer | None] | None) -> int:
    model_layer = moe_layers[index] if moe_layers is not None else None
    if model_layer is not None:
        return model_layer.num_experts
    layer = pool.layers[index]
    if layer is not None and layer.scores is not None:
        return len(layer.scores)
    return max((max(ids) + 1 for ids in pool.expert_ids if ids), default=0)


def _per_layer(pool: ExpertPool) -> str:
    return size_range([len(layer.experts) for layer in pool.layers if layer is not None])


def _calibration(pool: ExpertPool) -> str:
    made = pool.calibration
    if made is None:
        return "-"
    counts = (("documents", made.documents), ("tokens", made.tokens))
    return ", ".join(
        [printable(made.method), *(f"{n} {unit}" for unit, n in counts if n is not None)]
    )
