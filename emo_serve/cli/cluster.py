"""`emo-serve cluster ...`: several replicas behind one address, on Ray Serve.

`serve` runs them on this machine, or on a Ray cluster that is running; `config` prints what
`serve deploy` and KubeRay take; `status` asks the address. Ray is needed by `serve` only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from emo_serve.cli.commands import AddCommand, add_json_flag, adder, print_json
from emo_serve.cli.early import settings_of
from emo_serve.cli.output import announce
from emo_serve.cli.rendering.fleet import fleet_table
from emo_serve.cli.replica_flags import check_replica_flags
from emo_serve.cli.server_flags import READ_SECONDS, add_server_flags, server_of
from emo_serve.config import PATH_FLAGS, parse_size
from emo_serve.errors import ConfigError
from emo_serve.ray_cluster.manifests import ray_service, serve_config
from emo_serve.ray_cluster.settings import FleetSettings, read_replicas

__all__ = ["add_cluster_parser", "split_arguments"]

_COMMANDS = ("serve", "config")
_OTHERS = "Any flag of `emo-serve serve` may follow; each replica gets it."
_SWITCHES = ("-h", "--help", "--kubernetes")
_VALUES = (
    *("--replicas", "--host", "--port", "--cpus", "--gpus", "--memory"),
    *("--address", "--image"),
)
_OF_PROXIES = ("--uds", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--root-path")


def add_cluster_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    """Add `cluster` and its commands."""
    text = "serve with several replicas behind one address (needs the extra `cluster`)"
    parser = subparsers.add_parser("cluster", help=text, description=text)
    add = adder(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))
    _add_serve(add)
    _add_config(add)
    status = add("status", _run_status, "Show the replicas, and what each has resident.")
    add_server_flags(status, is_required=False, seconds=READ_SECONDS)
    add_json_flag(status)
    status.set_defaults(server="http://127.0.0.1:8000")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of the command itself, and those of the server in each replica.

    vLLM's flags are not known here, nor which of them take values, so argparse cannot do it.
    """
    if arguments[:1] != ["cluster"] or "".join(arguments[1:2]) not in _COMMANDS:
        return list(arguments), []
    ours, others = list(arguments[:2]), []
    rest = iter(arguments[2:])
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if flag in _SWITCHES:
            ours.append(argument)
        elif flag in _VALUES:
            ours += [argument] if equals else [argument, *islice(rest, 1)]
        else:
            others.append(argument)
    return ours, others


def _add_serve(add: AddCommand) -> None:
    command = add("serve", _run_serve, f"Start the replicas and serve. {_OTHERS}")
    _add_fleet_flags(command, host="127.0.0.1")
    command.add_argument(
        "--address",
        metavar="RAY",
        help="use the Ray cluster there, e.g. auto, and not one of this machine alone",
    )


def _add_config(add: AddCommand) -> None:
    text = f"Print the Serve config for `serve deploy`, or a manifest. {_OTHERS}"
    command = add("config", _run_config, text)
    _add_fleet_flags(command, host="0.0.0.0")
    command.add_argument(
        "--kubernetes", action="store_true", help="print a RayService manifest for KubeRay"
    )
    command.add_argument(
        "--image",
        default="emo-serve:cluster",
        help="the image of the manifest's pods, with emo-serve and its extra `cluster` (default:"
        " %(default)s)",
    )


def _add_fleet_flags(command: argparse.ArgumentParser, *, host: str) -> None:
    command.usage = f"{command.prog} [MODEL] [flags] [any flag of emo-serve serve]"
    command.allow_abbrev = False
    command.add_argument(
        "--replicas",
        default="2",
        metavar="N|MIN..MAX",
        help="how many replicas; with MIN..MAX as many as requests and pools need (default:"
        " %(default)s)",
    )
    command.add_argument("--host", default=host, help="where to listen (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    command.add_argument(
        "--cpus",
        type=float,
        default=0.0,
        metavar="N",
        help="cores per replica, on a machine that several share (default: with `serve`, an equal"
        " share without GPUs)",
    )
    command.add_argument(
        "--gpus",
        type=float,
        default=0.0,
        metavar="N",
        help="GPUs per replica (default: with `serve`, one per worker where Ray has GPUs)",
    )
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="host memory that Ray reserves per replica, e.g. 64GiB (default: none)",
    )


def _run_serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    from emo_serve.ray_cluster.environment import prepare_environment

    prepare_environment(is_alone=arguments.address is None)
    try:
        from emo_serve.ray_cluster.on_machine import run_fleet
    except ImportError as error:
        raise ConfigError(
            f"the cluster commands need Ray ({error}); install it with: pip install"
            " 'emo-serve[cluster]', or run `make cluster`"
        ) from error
    from emo_serve.server.startup.address import ServerAddress

    check_replica_flags(settings.argv, opens_model=arguments.address is None)
    listening = ServerAddress(arguments.host, arguments.port)
    return run_fleet(settings, listening, announce, arguments.address)


def _run_config(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if not (settings.cpus or settings.gpus):
        raise ConfigError(
            "a config must say what Ray reserves for each replica, or all of them may land on one"
            " machine: give --cpus or --gpus"
        )
    check_replica_flags(settings.argv, opens_model=False)
    # a pod has room for one replica, so there nothing more is reserved of its memory
    reserved = replace(settings, memory_bytes=0) if arguments.kubernetes else settings
    config = _yaml(serve_config(reserved, arguments.host, arguments.port))
    if arguments.kubernetes:
        config = _yaml(ray_service(settings, config, arguments.image, arguments.port))
    print(config, end="")
    return 0


def _run_status(arguments: argparse.Namespace) -> int:
    with server_of(arguments) as server:
        answer = server.list_pools()
    if "replicas" not in answer:
        raise ConfigError(
            f"{arguments.server} is one server, not a cluster; see `emo-serve pools list --server`"
        )
    if arguments.json:
        print_json(answer)
    else:
        print(fleet_table(answer))
    return 0


def _settings(arguments: argparse.Namespace) -> FleetSettings:
    others: Sequence[str] = arguments.of_replicas
    for flag in others:
        if flag.partition("=")[0] in _OF_PROXIES:
            raise ConfigError(
                f"{flag.partition('=')[0]} does not apply: Ray's proxies answer the clients; put"
                " TLS and paths into a proxy in front of them"
            )
    ours = settings_of(others)
    least, most = read_replicas(arguments.replicas)
    where = ["--host", arguments.host, "--port", str(arguments.port)]
    return FleetSettings(
        argv=(*_with_absolute_paths(others), *where),
        min_replicas=least,
        max_replicas=most,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
        memory_bytes=0 if arguments.memory is None else parse_size("--memory", arguments.memory),
        drain_seconds=ours.drain_timeout_seconds,
    )


def _with_absolute_paths(flags: Sequence[str]) -> list[str]:
    """Return the flags with MODEL and our paths absolute: replicas run in a directory of Ray's."""
    found: list[str] = []
    for place, argument in enumerate(flags):
        flag, equals, value = argument.partition("=")
        if flag in PATH_FLAGS and equals:
            found.append(f"{flag}={Path(value).absolute()}")
        elif place and flags[place - 1] in PATH_FLAGS:
            found.append(str(Path(argument).absolute()))
        elif not place and os.path.isdir(argument):  # MODEL
            found.append(os.path.abspath(argument))
        else:
            found.append(argument)
    return found


def _yaml(document: dict[str, Any]) -> str:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("config needs PyYAML: pip install 'emo-serve[cluster]'") from error

    class Dumper(yaml.SafeDumper):
        """Write texts of several lines as blocks, so that a config in a manifest can be read."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, block)
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, width=100)
