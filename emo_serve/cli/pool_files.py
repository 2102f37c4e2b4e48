"""`emo-serve pools import`, `export` and `compare`: work on pool files, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emo_serve.cli.commands import AddCommand, add_json_flag, print_json, report_refused
from emo_serve.cli.completion import completed_by, pools_of_directory
from emo_serve.cli.model_flag import KnownModel, add_model_flag, directory_of
from emo_serve.cli.progress import progress_of_bytes
from emo_serve.cli.rendering.comparison import describe_comparison
from emo_serve.cli.rendering.documents import comparison_record
from emo_serve.cli.rendering.tables import size_range
from emo_serve.errors import ConfigError
from emo_serve.facts import MoeLayer
from emo_serve.names import NAME_RULE
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.comparison import PoolComparison
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.pruned.metadata import read_pruning_metadata
from emo_serve.pools.sizes import served_pool

__all__ = ["add_file_commands"]

_IMPORT = "Turn a pruned checkpoint's list of experts into a pool."
_EXPORT = "Write a pool as its own checkpoint, in the released layout of pruned models."
_COMPARE = "Show how similar pools are and how many slots they need together."
_COMPARE_EPILOG = """\
Similarity is the Jaccard index: experts in both pools / experts in either. Similar pools share
slots; a small slab pays off where pools are not similar. The EMO paper (arXiv 2605.06663)
reports similarities across domains under 0.4 for EMO and over 0.6 for a standard MoE of its size.
Slots are per layer, as in --expert-slots; --expert-memory takes the bytes.
"""


def add_file_commands(add: AddCommand) -> None:
    """Add the three commands."""
    imported = add("import", _run_import, _IMPORT)
    imported.add_argument("path", type=Path, metavar="FILE", help="its pruning_metadata.json")
    imported.add_argument("--name", required=True, help=f"name of the pool: {NAME_RULE}")
    imported.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    add_model_flag(imported, "checkpoint of the pool's model; checks that the pool fits")

    export = add("export", _run_export, _EXPORT)
    pool = export.add_argument(
        "pool",
        metavar="NAME|FILE",
        help="pool file; with --pools a pool's name, a size of it: a@8, or a union: a+b",
    )
    completed_by(pool, pools_of_directory)
    add_model_flag(export, "checkpoint to prune", is_required=True)
    export.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory to write, new or empty"
    )
    export.add_argument("--pools", type=Path, metavar="DIR", help="directory of pool files")

    compare = add("compare", _run_compare, _COMPARE)
    compare.epilog = _COMPARE_EPILOG
    compare.add_argument("path", type=Path, metavar="DIR", help="directory of pool files")
    add_model_flag(compare, "checkpoint of the pools' model; adds bytes and implied experts")
    compare.add_argument(
        "--experts",
        type=int,
        metavar="K",
        help="cut each pool to its K best experts per layer first",
    )
    compare.add_argument(
        "--png", type=Path, metavar="FILE", help="draw heat maps; needs matplotlib"
    )
    add_json_flag(compare)


# -- import --


def _run_import(arguments: argparse.Namespace) -> int:
    model = KnownModel.open(arguments.model)
    pool = read_pruning_metadata(arguments.path, arguments.name, model.layers)
    write_pool(pool, arguments.out)
    checked = f"fits {arguments.model}" if arguments.model else "not checked: give --model to do so"
    sizes = size_range([len(layer.experts) for layer in pool.layers if layer is not None])
    print(f"wrote {arguments.out}: pool {pool.name}, {sizes} experts per layer ({checked})")
    return 0


# -- export --


def _run_export(arguments: argparse.Namespace) -> int:
    from emo_serve.families.opening import open_with_reference
    from emo_serve.pools.pruned.checkpoint import export_pool

    checkpoint = open_with_reference(
        *(directory_of(arguments.model), "pools export"),
        "serve the pool: emo-serve serve reads no experts but those of pools in use",
    )
    pool = _named(arguments.pool, arguments.pools, checkpoint.facts.moe_layers)
    with progress_of_bytes("writing") as tell:
        written = export_pool(pool, checkpoint, arguments.out, tell)
    served = served_pool(pool, checkpoint.facts.moe_layers, f"pool {pool.name!r}")
    kept = size_range([len(ids) for ids in served.expert_ids if ids])
    experts = [layer.num_experts for layer in checkpoint.facts.moe_layers if layer]
    files = "1 file" if written.weight_files == 1 else f"{written.weight_files} files"
    print(
        f"wrote {arguments.out}: pool {pool.name}, {kept} of {size_range(experts)} experts per"
        f" layer, {written.weight_bytes / 2**20:.1f} MiB of weights in {files}"
    )
    for note in written.notes:
        print(f"note: {note}")
    return 0


def _named(
    name: str, directory: Path | None, moe_layers: tuple[MoeLayer | None, ...]
) -> ExpertPool:
    """Return the pool of that name in the directory; without a directory, the pool of that file."""
    if directory is not None:
        catalog = PoolCatalog.read(directory, moe_layers)
        if name not in catalog.pools:
            report_refused(catalog.refused)
        return catalog.resolve(name)
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"{name} is not a file; to name a pool, give the directory of its file: --pools DIR"
        )
    return read_pool(path)


# -- compare --


def _run_compare(arguments: argparse.Namespace) -> int:
    if arguments.png is not None:
        from emo_serve.cli.plots import require_matplotlib

        require_matplotlib()
    model = KnownModel.open(arguments.model)
    catalog = PoolCatalog.read(arguments.path, model.layers, model.fingerprint)
    pools = list(catalog.pools.values())
    if arguments.experts is not None:
        pools = [pool.cut(arguments.experts, model.layers) for pool in pools]
    refused = report_refused(catalog.refused)
    if not pools:
        if not refused and not arguments.json:
            print(f"no pool files (*.json) in {arguments.path}")
        return refused
    comparison = PoolComparison(pools)
    if arguments.json:
        print_json(comparison_record(comparison, model.experts_per_layer, model.expert_bytes))
    else:
        print(describe_comparison(comparison, model.experts_per_layer, model.expert_bytes))
    if arguments.png is not None:
        _draw(comparison, arguments.png)
        print(f"drew {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return refused


def _draw(comparison: PoolComparison, path: Path) -> None:
    from emo_serve.cli.plots import comparison_png, write_picture

    write_picture(comparison_png(comparison), path)
