"""`emo-serve pools list|show|import`: pool files on the command line, without a server.

Tables go to stdout, refusals to stderr with exit status 2. Without --model a file is checked
against itself only; with it, against the model, and the experts that model implies are shown too.
torch and transformers are imported only then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.errors import EmoServeError
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.export import read_pruning_metadata
from emo_serve.pools.pool import ExpertPool

if TYPE_CHECKING:
    from emo_serve.emo.config import MoeLayer

__all__ = ["add_pools_parser", "expert_map", "pool_table"]

_REFUSED = 2
_HASH_CHARS = 12


def add_pools_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `pools` and its commands; each sets `run`, a function from the arguments to a status."""
    parser = subparsers.add_parser("pools", help="list, show and import pool files")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--model",
            type=Path,
            metavar="DIR",
            help="checkpoint directory of the model the pools are for; checks that they fit it",
        )
        command.set_defaults(run=_reporting(run))
        return command

    listing = add("list", _run_list, "List the pools of a directory.")
    listing.add_argument(
        "path", type=Path, metavar="DIR", help="directory of pool files, or a file"
    )
    show = add("show", _run_show, "Show one pool with a map of its experts.")
    show.add_argument("path", type=Path, metavar="FILE", help="pool file, or a directory of them")
    imported = add("import", _run_import, "Turn a pruned checkpoint's list of experts into a pool.")
    imported.add_argument("path", type=Path, metavar="FILE", help="its pruning_metadata.json")
    imported.add_argument("--name", required=True, help="name of the pool: a-z 0-9 . _ -")
    imported.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")


@dataclass(frozen=True)
class _Model:
    """What --model says; without it, nothing is known."""

    layers: tuple[MoeLayer | None, ...] | None = None
    fingerprint: str | None = None
    expert_bytes: int | None = None

    @classmethod
    def open(cls, directory: Path | None) -> _Model:
        if directory is None:
            return cls()
        from emo_serve.emo.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(directory)
        layers = checkpoint.config.moe_layers
        return cls(layers, checkpoint.fingerprint(), checkpoint.expert_bytes)


# -- commands --


def _reporting(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def report(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except EmoServeError as error:
            print(f"emo-serve: {error}", file=sys.stderr)
            return _REFUSED

    return report


def _run_list(arguments: argparse.Namespace) -> int:
    model = _Model.open(arguments.model)
    catalog = PoolCatalog.read(arguments.path, model.layers, model.fingerprint)
    if catalog.pools:
        print(pool_table(list(catalog.pools.values()), model.expert_bytes))
    elif not catalog.refused:
        print(f"no pool files (*.json) in {arguments.path}")
    return _report_refused(catalog)


def _run_show(arguments: argparse.Namespace) -> int:
    model = _Model.open(arguments.model)
    catalog = PoolCatalog.read(arguments.path, model.layers, model.fingerprint)
    print("\n\n".join(_description(pool, model) for pool in catalog.pools.values()))
    return _report_refused(catalog)


def _run_import(arguments: argparse.Namespace) -> int:
    model = _Model.open(arguments.model)
    pool = read_pruning_metadata(arguments.path, arguments.name, model.layers)
    pool.write(arguments.out)
    checked = f"fits {arguments.model}" if arguments.model else "not checked: give --model to do so"
    print(
        f"wrote {arguments.out}: pool {pool.name}, {_per_layer(pool)} experts a layer ({checked})"
    )
    return 0


def _report_refused(catalog: PoolCatalog) -> int:
    for error in catalog.refused:
        print(f"emo-serve: refused {error}", file=sys.stderr)
    return _REFUSED if catalog.refused else 0


# -- text --


def pool_table(pools: Sequence[ExpertPool], expert_bytes: int | None = None) -> str:
    """Lay out one pool a row; the size column needs the bytes of one expert."""
    header = ["POOL", "EXPERTS A LAYER", "TOTAL", "TEMPERATURE", "CALIBRATION", "HASH"]
    if expert_bytes is not None:
        header.insert(3, "MIB")
    rows = [header]
    for pool in pools:
        total = sum(map(len, pool.expert_ids))
        row = [pool.name, _per_layer(pool), str(total), f"{pool.router_temperature:g}"]
        row += [_calibration(pool), pool.content_hash[:_HASH_CHARS]]
        if expert_bytes is not None:
            row.insert(3, f"{total * expert_bytes / 2**20:.1f}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def expert_map(pool: ExpertPool, moe_layers: Sequence[MoeLayer | None] | None = None) -> str:
    """Draw layers down, experts across: `#` in the pool, `+` in every pool, `.` not in it.

    Without the model, the number of experts is what the scores say, or else the highest id listed.
    """
    widths = [_num_experts(pool, index, moe_layers) for index in range(len(pool.layers))]
    labels = [f"layer {index}" for index in range(len(pool.layers))]
    margin = max(map(len, labels)) + 2
    ruler = "".join(str(start).ljust(8) for start in range(0, max(widths, default=0), 8))
    lines = [" " * margin + ruler.rstrip()]
    for index, (label, width) in enumerate(zip(labels, widths, strict=True)):
        model_layer = moe_layers[index] if moe_layers is not None else None
        implied = model_layer.implied if model_layer is not None else frozenset()
        inside = set(pool.expert_ids[index])
        marks = (
            "." if expert not in inside else "+" if expert in implied else "#"
            for expert in range(width)
        )
        drawn = "dense" if pool.layers[index] is None else "".join(marks)
        lines.append(label.ljust(margin) + drawn)
    return "\n".join(lines)


def _num_experts(pool: ExpertPool, index: int, moe_layers: Sequence[MoeLayer | None] | None) -> int:
    model_layer = moe_layers[index] if moe_layers is not None else None
    if model_layer is not None:
        return model_layer.num_experts
    layer = pool.layers[index]
    if layer is not None and layer.scores is not None:
        return len(layer.scores)
    return max((max(ids) + 1 for ids in pool.expert_ids if ids), default=0)


def _description(pool: ExpertPool, model: _Model) -> str:
    total = sum(map(len, pool.expert_ids))
    has_scores = any(layer is not None and layer.scores is not None for layer in pool.layers)
    size = f", {total * model.expert_bytes / 2**20:.1f} MiB" if model.expert_bytes else ""
    made_for = pool.model.name or pool.model.fingerprint if pool.model else None
    facts = {
        "pool": pool.name,
        "description": pool.description,
        "experts": f"{_per_layer(pool)} a layer, {total} in all{size}",
        "scores": "of all experts: can be cut to any size" if has_scores else "none",
        "temperature": f"{pool.router_temperature:g}",
        "made for": made_for,
        "calibration": _calibration(pool),
        "hash": pool.content_hash,
    }
    lines = [f"{key:<12} {value}" for key, value in facts.items() if value]
    legend = "experts across: # in the pool" + (", + in every pool" if model.layers else "")
    return "\n".join([*lines, "", legend, expert_map(pool, model.layers)])


def _per_layer(pool: ExpertPool) -> str:
    sizes = [len(layer.experts) for layer in pool.layers if layer is not None]
    low, high = min(sizes, default=0), max(sizes, default=0)
    return str(low) if low == high else f"{low}-{high}"


def _calibration(pool: ExpertPool) -> str:
    made = pool.calibration
    if made is None:
        return "-"
    counts = (("documents", made.documents), ("tokens", made.tokens))
    return ", ".join([made.method, *(f"{n} {unit}" for unit, n in counts if n is not None)])
