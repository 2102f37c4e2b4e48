"""`emo-serve pools ...`: pool files on the command line, and the pools of a running server.

`list` and `show` read files, or with --server ask a server; `usage` asks one; `load`, `evict`,
`pin`, `unpin`, `add` and `remove` change one. Tables go to stdout; a refusal is one line on stderr
and status 2, a server that fails or does not answer is status 1. Without --model a file is checked
against itself only; with it, against the model. torch, transformers and httpx are imported only
where they are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.cli.build import add_calibration_commands
from emo_serve.cli.pool_files import add_file_commands
from emo_serve.cli.rendering.server_tables import describe_card, slab_map, status_line, status_table
from emo_serve.cli.rendering.tables import describe_pool, pool_table, printable, size_range
from emo_serve.cli.server_flags import (
    CHANGE_SECONDS,
    READ_SECONDS,
    add_server_flags,
    server_of,
)
from emo_serve.cli.usage import add_usage_command
from emo_serve.errors import ConfigError, EmoServeError, Unavailable
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pruned.metadata import read_pruning_metadata

if TYPE_CHECKING:
    from emo_serve.emo.config import MoeLayer

__all__ = ["add_pools_parser"]

_REFUSED = 2
_SERVER_FAILED = 1

_Command = Callable[[argparse.Namespace], int]


def add_pools_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    default_model: Path | None = None,
) -> None:
    """Add `pools` and its commands; each sets `run`, a function from the arguments to a status.

    `default_model` is the checkpoint that `build` calibrates on when it is told none.
    """
    text = "build, list, show and import pool files; ask and change the pools of a running server"
    parser = subparsers.add_parser("pools", help=text, description=text)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: _Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=_reporting(run))
        return command

    listing = add("list", _run_list, "List the pools of a directory, or of a server.")
    listing.add_argument(
        "path", nargs="?", type=Path, metavar="DIR", help="directory of pool files, or a file"
    )
    listing.add_argument(
        "--map", action="store_true", help="with --server: draw which experts are resident"
    )
    show = add("show", _run_show, "Show one pool with a map of its experts.")
    show.add_argument(
        "path", metavar="FILE|NAME", help="pool file or directory; with --server a pool's name"
    )
    imported = add("import", _run_import, "Turn a pruned checkpoint's list of experts into a pool.")
    imported.add_argument("path", type=Path, metavar="FILE", help="its pruning_metadata.json")
    imported.add_argument("--name", required=True, help="name of the pool: a-z 0-9 . _ -")
    imported.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    for command in (listing, show, imported):
        command.add_argument(
            "--model",
            type=Path,
            metavar="DIR",
            help="checkpoint directory of the model the pools are for; checks that they fit it",
        )
    for command in (listing, show):
        add_server_flags(command, is_required=False, seconds=READ_SECONDS)
    add_usage_command(add)
    add_file_commands(add)
    add_calibration_commands(add, default_model)
    _add_changing(add)


def _add_changing(add: Callable[[str, _Command, str], argparse.ArgumentParser]) -> None:
    load = add("load", _run_load, "Make a pool of a server resident.")
    load.add_argument("--pin", action="store_true", help="and have it stay")
    evict = add("evict", _run_evict, "Free the slots that only this pool needs.")
    evict.add_argument(
        "--drain",
        action="store_true",
        help="let no new requests in and evict it when the running ones have ended",
    )
    pin = add("pin", _run_pin, "Make a pool of a server resident and have it stay.")
    unpin = add("unpin", _run_unpin, "Let a pool of a server be evicted like any other.")
    remove = add("remove", _run_remove, "Make a server forget a pool, its file included.")
    for command in (load, evict, pin, unpin):
        command.add_argument("name", metavar="NAME", help="a pool's name, or a union: math+code")
    remove.add_argument("name", metavar="NAME", help="a pool's name")
    added = add("add", _run_add, "Give a server a pool; it keeps it in its --pools directory.")
    added.add_argument("path", type=Path, metavar="FILE", help="pool file")
    added.add_argument("--replace", action="store_true", help="redefine a pool of that name")
    for command in (load, evict, pin, unpin, remove, added):
        add_server_flags(command, is_required=True, seconds=CHANGE_SECONDS)


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


def _reporting(run: _Command) -> _Command:
    def report(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except EmoServeError as error:
            print(f"emo-serve: {error}", file=sys.stderr)
            return _SERVER_FAILED if isinstance(error, Unavailable) else _REFUSED

    return report


# -- files, or a server --


def _run_list(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        return _list_server(arguments)
    if arguments.path is None:
        raise ConfigError("pools list: give a directory of pool files, or --server URL")
    if arguments.map:
        raise ConfigError("pools list: --map draws what is resident on a server; give --server URL")
    model = _Model.open(arguments.model)
    catalog = PoolCatalog.read(arguments.path, model.layers, model.fingerprint)
    if catalog.pools:
        print(pool_table(list(catalog.pools.values()), model.expert_bytes))
    elif not catalog.refused:
        print(f"no pool files (*.json) in {arguments.path}")
    return _report_refused(map(str, catalog.refused))


def _list_server(arguments: argparse.Namespace) -> int:
    _refuse_with_server("list", "DIR", arguments.path)
    _refuse_with_server("list", "--model", arguments.model)
    with server_of(arguments) as server:
        answer = server.list_pools(experts=arguments.map)
    print(status_table(answer))
    if arguments.map:
        print(f"\n{slab_map(answer)}")
    _report_refused(map(printable, answer["refused"]))
    return 0


def _run_show(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        _refuse_with_server("show", "--model", arguments.model)
        with server_of(arguments) as server:
            print(describe_card(server.show(arguments.path)))
        return 0
    model = _Model.open(arguments.model)
    catalog = PoolCatalog.read(Path(arguments.path), model.layers, model.fingerprint)
    described = (
        describe_pool(pool, model.layers, model.expert_bytes) for pool in catalog.pools.values()
    )
    print("\n\n".join(described))
    return _report_refused(map(str, catalog.refused))


def _run_import(arguments: argparse.Namespace) -> int:
    model = _Model.open(arguments.model)
    pool = read_pruning_metadata(arguments.path, arguments.name, model.layers)
    write_pool(pool, arguments.out)
    checked = f"fits {arguments.model}" if arguments.model else "not checked: give --model to do so"
    sizes = size_range([len(layer.experts) for layer in pool.layers if layer is not None])
    print(f"wrote {arguments.out}: pool {pool.name}, {sizes} experts a layer ({checked})")
    return 0


def _report_refused(refused: Iterable[str]) -> int:
    reasons = list(refused)
    for reason in reasons:
        print(f"emo-serve: refused {reason}", file=sys.stderr)
    return _REFUSED if reasons else 0


# -- a server --


def _refuse_with_server(command: str, argument: str, value: object) -> None:
    if value is not None:
        raise ConfigError(f"pools {command}: {argument} is for files and --server is not; give one")


def _run_load(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        print(status_line(server.load(arguments.name, pin=arguments.pin)))
    return 0


def _run_evict(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        print(status_line(server.evict(arguments.name, drain=arguments.drain)))
    return 0


def _run_pin(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        print(status_line(server.pin(arguments.name)))
    return 0


def _run_unpin(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        print(status_line(server.unpin(arguments.name)))
    return 0


def _run_add(arguments: argparse.Namespace) -> int:
    pool = read_pool(arguments.path)  # says what is wrong before anything is sent
    with server_of(arguments) as server:
        card = server.add(arguments.path.read_bytes(), replace=arguments.replace)
    stored = "stored" if card["persisted"] else "not stored: until the server ends"
    print(f"pool {pool.name}: version {card['version']}, {stored}")
    print(status_line(card))
    return 0


def _run_remove(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        server.remove(arguments.name)
    print(f"pool {arguments.name} is removed")
    return 0
