"""`emo-serve pools export` and `compare`: what pool files are good for without a server.

Part of `commands`, with its conventions: tables to stdout, a refusal is one line on stderr and
status 2. torch and matplotlib are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.cli.rendering.comparison import describe_comparison
from emo_serve.cli.rendering.tables import size_range
from emo_serve.errors import ConfigError
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.comparison import PoolComparison
from emo_serve.pools.document import read_pool
from emo_serve.pools.pool import ExpertPool

if TYPE_CHECKING:
    from emo_serve.emo.config import MoeLayer

__all__ = ["add_file_commands"]

_REFUSED = 2
_EXPORT = "Write a pool as a checkpoint of its own, in the released layout of pruned models."
_COMPARE = "Show how alike pools are and how many slots they need together."
_COMPARE_EPILOG = """\
Similarity is the Jaccard index: experts in both pools / experts in either. Pools that are alike
share slots; pools that are not are what makes a small slab work. The EMO paper (arXiv 2605.06663)
reports similarities across domains under 0.4 for EMO and over 0.6 for a standard MoE of its size.
Slots are a layer's, as in --expert-slots; --expert-memory takes the bytes.
"""

_Command = Callable[[argparse.Namespace], int]


def add_file_commands(add: Callable[[str, _Command, str], argparse.ArgumentParser]) -> None:
    """Add the two commands by `add`, which takes a name, what to run, and a line of help."""
    export = add("export", _run_export, _EXPORT)
    export.add_argument(
        "pool", metavar="NAME|FILE", help="pool file; with --pools a pool's name, or a union: a+b"
    )
    export.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="checkpoint directory to prune"
    )
    export.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory to write, new or empty"
    )
    export.add_argument("--pools", type=Path, metavar="DIR", help="directory of pool files")

    compare = add("compare", _run_compare, _COMPARE)
    compare.epilog = _COMPARE_EPILOG
    compare.add_argument("path", type=Path, metavar="DIR", help="directory of pool files")
    compare.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint directory of the model the pools are for; adds bytes and implied experts",
    )
    compare.add_argument(
        "--experts", type=int, metavar="K", help="cut each pool to its K best experts a layer first"
    )
    compare.add_argument(
        "--png", type=Path, metavar="FILE", help="draw heat maps; needs matplotlib"
    )


# -- export --


def _run_export(arguments: argparse.Namespace) -> int:
    from emo_serve.emo.checkpoint import Checkpoint
    from emo_serve.pools.pruned.checkpoint import export_pool

    checkpoint = Checkpoint.open(arguments.model)
    pool = _named(arguments.pool, arguments.pools, checkpoint.config.moe_layers)
    written = export_pool(pool, checkpoint, arguments.out)
    complete = pool.complete(checkpoint.config.moe_layers)
    kept = size_range([len(ids) for ids in complete.expert_ids if ids])
    experts = [layer.num_experts for layer in checkpoint.config.moe_layers if layer]
    files = "1 file" if written.weight_files == 1 else f"{written.weight_files} files"
    print(
        f"wrote {arguments.out}: pool {pool.name}, {kept} of {size_range(experts)} experts a layer,"
        f" {written.weight_bytes / 2**20:.1f} MiB of weights in {files}"
    )
    for note in written.notes:
        print(f"note: {note}")
    return 0


def _named(
    name: str, directory: Path | None, moe_layers: tuple[MoeLayer | None, ...]
) -> ExpertPool:
    """Return the pool of that name in the directory, or without one the pool of that file."""
    if directory is not None:
        catalog = PoolCatalog.read(directory, moe_layers)
        if name not in catalog.pools:
            _report_refused(catalog)
        return catalog.resolve(name)
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"{name} is no file; for the name of a pool give the directory of its file: --pools DIR"
        )
    return read_pool(path)


# -- compare --


def _run_compare(arguments: argparse.Namespace) -> int:
    if arguments.png is not None:
        from emo_serve.cli.plots import require_matplotlib

        require_matplotlib()
    moe_layers = fingerprint = expert_bytes = experts = None
    if arguments.model is not None:
        from emo_serve.emo.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(arguments.model)
        moe_layers, expert_bytes = checkpoint.config.moe_layers, checkpoint.expert_bytes
        fingerprint = checkpoint.fingerprint()
        experts = [layer.num_experts for layer in moe_layers if layer]
    catalog = PoolCatalog.read(arguments.path, moe_layers, fingerprint)
    pools = list(catalog.pools.values())
    if arguments.experts is not None:
        pools = [pool.cut(arguments.experts, moe_layers) for pool in pools]
    refused = _report_refused(catalog)
    if not pools:
        if not refused:
            print(f"no pool files (*.json) in {arguments.path}")
        return refused
    comparison = PoolComparison(pools)
    print(describe_comparison(comparison, experts, expert_bytes))
    if arguments.png is not None:
        _draw(comparison, arguments.png)
    return refused


def _draw(comparison: PoolComparison, path: Path) -> None:
    from emo_serve.cli.plots import comparison_png, write_picture

    write_picture(comparison_png(comparison), path)
    print(f"drew {path}")


def _report_refused(catalog: PoolCatalog) -> int:
    for reason in catalog.refused:
        print(f"emo-serve: refused {reason}", file=sys.stderr)
    return _REFUSED if catalog.refused else 0
