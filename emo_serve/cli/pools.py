"""`emo-serve pools ...`: pool files on the command line, and the pools of a running server.

`list` and `show` read files, or with --server ask a server. `import`, `export`, `compare`, `build`
and `cut` work on files. `top` and `usage` ask a server. `load`, `evict`, `pin`, `unpin`, `add` and
`remove` change one. A refusal is status 2; a server that fails or does not answer is status 1.
torch, transformers, httpx and matplotlib are imported only by the commands that need them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emo_serve.cli.build import add_build_commands
from emo_serve.cli.commands import adder
from emo_serve.cli.pool_changes import add_change_commands
from emo_serve.cli.pool_files import add_file_commands
from emo_serve.cli.pool_listing import add_listing_commands
from emo_serve.cli.top import add_top_command
from emo_serve.cli.usage import add_usage_command

__all__ = ["add_pools_parser"]


def add_pools_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    default_model: Path | None = None,
) -> None:
    """Add `pools` and its commands; each sets `run`, a function from the arguments to a status.

    `default_model` is the checkpoint that `build` uses without --model.
    """
    text = "build, list, show and import pool files; ask and change the pools of a running server"
    parser = subparsers.add_parser("pools", help=text, description=text)
    add = adder(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    add_listing_commands(add)
    add_top_command(add)
    add_usage_command(add)
    add_file_commands(add)
    add_build_commands(add, default_model)
    add_change_commands(add)
