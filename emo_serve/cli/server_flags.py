"""The flags by which commands reach a running server.

httpx is imported only when a server is used.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from emo_serve.cli.completion import completed_by
from emo_serve.errors import ConfigError, EmoServeError

if TYPE_CHECKING:
    from emo_serve.cli.client import PoolServer

__all__ = [
    "BUILD_SECONDS",
    "CHANGE_SECONDS",
    "LOCAL_SERVER",
    "NAME_HELP",
    "READ_SECONDS",
    "add_name",
    "add_server_flags",
    "pools_of_server",
    "server_of",
]

NAME_HELP = "a pool's name, a size of it: math@8, or a union: math+code"
LOCAL_SERVER = "http://127.0.0.1:8000"
"""Where `emo-serve serve` listens without flags."""
READ_SECONDS = 30.0
CHANGE_SECONDS = 600.0
"""A load may have to wait until long requests end."""
BUILD_SECONDS = 3600.0
"""A build runs every example once per layer, behind all other requests."""
_PATIENCE_SECONDS = 2.0  # of someone who pressed Tab


def add_server_flags(
    command: argparse.ArgumentParser,
    *,
    is_required: bool = False,
    seconds: float,
    default: str | None = None,
) -> None:
    """Add --server, with a default or none, --api-key and --timeout, whose default is `seconds`."""
    text = f"ask the emo-serve server there, e.g. {LOCAL_SERVER}"
    command.add_argument(
        "--server",
        required=is_required,
        default=default,
        metavar="URL",
        help="the emo-serve server to ask (default: %(default)s)" if default else text,
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


def add_name(
    command: argparse.ArgumentParser, text: str = NAME_HELP, *, is_required: bool = True
) -> None:
    """Add NAME, a pool of the server, which a shell can complete."""
    nargs = None if is_required else "?"
    action = command.add_argument("name", metavar="NAME", nargs=nargs, help=text)
    completed_by(action, pools_of_server)


def server_of(arguments: argparse.Namespace) -> PoolServer:
    """Return a client of the server that the flags name; for use in a `with`."""
    from emo_serve.cli.client import PoolServer
    from emo_serve.cli.connection import key_from

    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout is {arguments.timeout:g}; give seconds, more than 0")
    key = key_from(arguments.api_key)
    return PoolServer(arguments.server, key, timeout_seconds=arguments.timeout)


def pools_of_server(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the names of the pools of the server that the line names; none if it is silent."""
    url = getattr(parsed_args, "server", None) or LOCAL_SERVER
    key = getattr(parsed_args, "api_key", None)
    asked = argparse.Namespace(server=url, api_key=key, timeout=_PATIENCE_SECONDS)
    try:
        with server_of(asked) as server:
            return [card["name"] for card in server.list_pools()["data"]]
    except EmoServeError:  # nobody could be told
        return []
