"""The flags by which commands of `emo-serve pools` reach a running server.

httpx is imported only when a server is used.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from emo_serve.errors import ConfigError

if TYPE_CHECKING:
    from emo_serve.cli.client import PoolServer

__all__ = [
    "BUILD_SECONDS",
    "CHANGE_SECONDS",
    "NAME_HELP",
    "READ_SECONDS",
    "add_server_flags",
    "server_of",
]

NAME_HELP = "a pool's name, a size of it: math@8, or a union: math+code"
READ_SECONDS = 30.0
CHANGE_SECONDS = 600.0
"""A load may have to wait until long requests end."""
BUILD_SECONDS = 3600.0
"""A build runs every example once per layer, behind all other requests."""


def add_server_flags(
    command: argparse.ArgumentParser, *, is_required: bool, seconds: float
) -> None:
    """Add --server, --api-key and --timeout, whose default is `seconds`."""
    command.add_argument(
        "--server",
        required=is_required,
        metavar="URL",
        help="ask the emo-serve server there, e.g. http://127.0.0.1:8000",
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help="the server's key (default: EMO_SERVE_ADMIN_API_KEY, EMO_SERVE_API_KEY or"
        " VLLM_API_KEY, in this order)",
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=seconds,
        metavar="SECONDS",
        help="how long to wait for its answer (default: %(default)g)",
    )


def server_of(arguments: argparse.Namespace) -> PoolServer:
    """Return a client of the server that the flags name; for use in a `with`."""
    from emo_serve.cli.client import PoolServer, key_from

    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout is {arguments.timeout:g}; give seconds, more than 0")
    key = key_from(arguments.api_key)
    return PoolServer(arguments.server, key, timeout_seconds=arguments.timeout)
