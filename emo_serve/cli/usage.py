"""`emo-serve pools usage`: how often a server's requests have taken each expert of a pool.

It shows how small a pool may be: experts that are rarely taken can be cut (`pools cut`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emo_serve.cli.commands import AddCommand, add_json_flag, print_json
from emo_serve.cli.rendering.tables import printable
from emo_serve.cli.rendering.usage import describe_usage, layers_of
from emo_serve.cli.server_flags import READ_SECONDS, add_name, add_server_flags, server_of
from emo_serve.errors import ConfigError

__all__ = ["add_usage_command"]

_USAGE = "Show how often a server's requests have taken each expert of a pool."


def add_usage_command(add: AddCommand) -> None:
    """Add the command."""
    usage = add("usage", _run_usage, _USAGE)
    add_name(usage)
    usage.add_argument("--png", type=Path, metavar="FILE", help="draw a heat map; needs matplotlib")
    add_server_flags(usage, is_required=True, seconds=READ_SECONDS)
    add_json_flag(usage)


def _run_usage(arguments: argparse.Namespace) -> int:
    if arguments.png is not None:
        from emo_serve.cli.plots import require_matplotlib

        require_matplotlib()
    with server_of(arguments) as server:
        answer = server.usage(arguments.name)
    name = printable(answer["name"])
    if arguments.png is not None and not answer["tokens"]:
        raise ConfigError(f"--png: no token was routed in pool {name} yet; nothing to draw")
    if arguments.json:
        print_json(answer)
    elif answer["tokens"]:
        print(describe_usage(answer, layers_of(answer)))
    else:
        print(f"pool {name}: no token was routed in it since the engine started")
    if arguments.png is not None:
        from emo_serve.cli.plots import usage_png, write_picture

        shares = [layer.shares for layer in layers_of(answer)]
        write_picture(usage_png(name, shares), arguments.png)
        print(f"drew {arguments.png}", file=sys.stderr if arguments.json else sys.stdout)
    return 0
