"""`emo-serve pools top`: the pools of a running server as a live table.

The server tells when something changes (/v1/residency/events), so an open table costs it little.
Beside a terminal, or with --once, the table is printed once.
"""

from __future__ import annotations

import argparse
import sys
import threading
from typing import TYPE_CHECKING, Any

from emo_serve.cli.commands import AddCommand
from emo_serve.cli.server_flags import LOCAL_SERVER, READ_SECONDS, add_server_flags, server_of
from emo_serve.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from emo_serve.cli.client import PoolServer

__all__ = ["add_top_command"]

_PER_SECOND = 2.0  # ages grow even while nothing happens


def add_top_command(add: AddCommand) -> None:
    """Add the command."""
    top = add("top", _run, "Watch the pools of a server: a table that is always up to date.")
    top.add_argument("--once", action="store_true", help="print the table once")
    add_server_flags(top, seconds=READ_SECONDS, default=LOCAL_SERVER)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from emo_serve.cli.rendering.live_table import live_table

    console = Console(file=sys.stdout, highlight=False, markup=False)
    with server_of(arguments) as server:
        if arguments.once or not console.is_terminal:
            answer = server.list_pools()
            everything = len(answer["data"]) + 100
            console.print(live_table(answer, server.url, everything), soft_wrap=True)
            return 0
        try:
            _watch(server, console)
        except KeyboardInterrupt:
            return 0
    return 0


def _watch(server: PoolServer, console: Console) -> None:
    """Draw until Ctrl-C; raises Unavailable when the server ends."""
    from rich.live import Live

    from emo_serve.cli.rendering.live_table import live_table

    newest: dict[str, Any] = server.list_pools()
    lock = threading.Lock()  # Live draws on a thread of its own

    def drawn() -> Any:
        with lock:
            return live_table(newest, server.url, console.height)

    live = Live(get_renderable=drawn, console=console, screen=True, refresh_per_second=_PER_SECOND)
    with server.follow() as events, live:
        for name, document in events:
            if name == "pools":
                with lock:
                    newest = document
                live.refresh()
    raise Unavailable(f"{server.url} has ended its stream: it is stopping, or was restarted")
