"""`emo-serve pools list` and `show`: pool files, or with --server the pools of a running server.

Without --model a file is checked against itself only; with it, against the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emo_serve.cli.commands import AddCommand, add_json_flag, print_json, report_refused
from emo_serve.cli.completion import completed_by, files_that_begin
from emo_serve.cli.model_flag import KnownModel, add_model_flag
from emo_serve.cli.rendering.documents import pool_list, pool_record
from emo_serve.cli.rendering.server_tables import describe_card, slab_map, status_table
from emo_serve.cli.rendering.tables import describe_pool, pool_table, printable
from emo_serve.cli.server_flags import (
    NAME_HELP,
    READ_SECONDS,
    add_server_flags,
    pools_of_server,
    server_of,
)
from emo_serve.errors import ConfigError
from emo_serve.pools.catalog import PoolCatalog

__all__ = ["add_listing_commands"]


def add_listing_commands(add: AddCommand) -> None:
    """Add the two commands."""
    listing = add("list", _run_list, "List the pools of a directory, or of a server.")
    listing.add_argument(
        "path", nargs="?", type=Path, metavar="DIR", help="directory of pool files, or a file"
    )
    listing.add_argument(
        "--map", action="store_true", help="with --server: draw which experts are resident"
    )
    show = add("show", _run_show, "Show one pool with a map of its experts.")
    shown = show.add_argument(
        "path", metavar="FILE|NAME", help=f"pool file or directory; with --server {NAME_HELP}"
    )
    completed_by(shown, _files_or_pools)
    for command in (listing, show):
        add_model_flag(command, "checkpoint of the pools' model; checks that they fit it")
        add_server_flags(command, seconds=READ_SECONDS)
    add_json_flag(listing, show)


def _run_list(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        return _list_server(arguments)
    if arguments.path is None:
        raise ConfigError("pools list: give a directory of pool files, or --server URL")
    if arguments.map:
        raise ConfigError("pools list: --map draws what is resident on a server; give --server URL")
    model = KnownModel.open(arguments.model)
    catalog = PoolCatalog.read(arguments.path, model.layers, model.fingerprint)
    if arguments.json:
        print_json(pool_list(catalog, model.expert_bytes))
    elif catalog.pools:
        print(pool_table(list(catalog.pools.values()), model.expert_bytes))
    elif not catalog.refused:
        print(f"no pool files (*.json) in {arguments.path}")
    return report_refused(catalog.refused)


def _list_server(arguments: argparse.Namespace) -> int:
    _refuse_with_server("list", "DIR", arguments.path)
    _refuse_with_server("list", "--model", arguments.model)
    with server_of(arguments) as server:
        answer = server.list_pools(experts=arguments.map)
    if arguments.json:
        print_json(answer)
        return 0
    print(status_table(answer))
    if arguments.map:
        print(f"\n{slab_map(answer)}")
    report_refused(map(printable, answer["refused"]))
    return 0


def _run_show(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        _refuse_with_server("show", "--model", arguments.model)
        with server_of(arguments) as server:
            card = server.show(arguments.path)
        if arguments.json:
            print_json(card)
        else:
            print(describe_card(card))
        return 0
    model = KnownModel.open(arguments.model)
    catalog = PoolCatalog.read(Path(arguments.path), model.layers, model.fingerprint)
    if arguments.json:
        records = [pool_record(pool, model.expert_bytes) for pool in catalog.pools.values()]
        print_json(records[0] if Path(arguments.path).is_file() and records else records)
        return report_refused(catalog.refused)
    described = (
        describe_pool(pool, model.layers, model.expert_bytes) for pool in catalog.pools.values()
    )
    print("\n\n".join(described))
    return report_refused(catalog.refused)


def _files_or_pools(parsed_args: argparse.Namespace, prefix: str, **_: Any) -> list[str]:
    if parsed_args.server is not None:
        return pools_of_server(parsed_args)
    return files_that_begin(prefix)


def _refuse_with_server(command: str, argument: str, value: object) -> None:
    if value is not None:
        raise ConfigError(f"pools {command}: {argument} is for files and --server is not; give one")
