"""`emo-serve pools load|evict|pin|unpin|add|remove`: change the pools of a running server."""

from __future__ import annotations

import argparse
from pathlib import Path

from emo_serve.cli.commands import AddCommand
from emo_serve.cli.rendering.server_tables import slots_line, status_line
from emo_serve.cli.server_flags import CHANGE_SECONDS, add_name, add_server_flags, server_of
from emo_serve.errors import ConfigError
from emo_serve.pools.document import read_pool

__all__ = ["add_change_commands"]


def add_change_commands(add: AddCommand) -> None:
    """Add the six commands."""
    load = add("load", _run_load, "Make a pool of a server resident.")
    load.add_argument("--pin", action="store_true", help="and keep it resident")
    evict = add("evict", _run_evict, "Free the slots that only this pool needs.")
    evict.add_argument(
        "--drain",
        action="store_true",
        help="admit no new requests and evict the pool when running ones have ended",
    )
    evict.add_argument("--all", action="store_true", help="evict every pool that is not pinned")
    pin = add("pin", _run_pin, "Make a pool of a server resident and keep it so.")
    unpin = add("unpin", _run_unpin, "Allow a server to evict a pool again.")
    remove = add("remove", _run_remove, "Remove a pool and its file from a server.")
    for command in (load, pin, unpin):
        add_name(command)
    add_name(evict, is_required=False)
    add_name(remove, "a pool's name")
    added = add(
        "add", _run_add, "Add a pool to a server, which stores it in its --pools directory."
    )
    added.add_argument("path", type=Path, metavar="FILE", help="pool file")
    added.add_argument("--replace", action="store_true", help="redefine a pool of that name")
    for command in (load, evict, pin, unpin, remove, added):
        add_server_flags(command, is_required=True, seconds=CHANGE_SECONDS)


def _run_load(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        print(status_line(server.load(arguments.name, pin=arguments.pin)))
    return 0


def _run_evict(arguments: argparse.Namespace) -> int:
    if (arguments.name is None) is not arguments.all:
        raise ConfigError("give the NAME of one pool, or --all")
    with server_of(arguments) as server:
        if arguments.name is not None:
            print(status_line(server.evict(arguments.name, drain=arguments.drain)))
            return 0
        left = server.evict_all(drain=arguments.drain)
    for card in left["data"]:
        if card["row"] is not None:
            print(status_line(card))
    print(slots_line(left["slots"]))
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
    pool = read_pool(arguments.path)  # a bad file is refused before anything is sent
    with server_of(arguments) as server:
        card = server.add(arguments.path.read_bytes(), replace=arguments.replace)
    stored = "stored" if card["persisted"] else "not stored: lasts until the server stops"
    print(f"pool {pool.name}: version {card['version']}, {stored}")
    print(status_line(card))
    return 0


def _run_remove(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        server.remove(arguments.name)
    print(f"pool {arguments.name} is removed")
    return 0
