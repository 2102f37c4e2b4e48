"""The command `emo-serve`: parses flags, runs commands, reports refusals.

Heavy imports wait until a command needs them, so that `--help`, `--version` and refused flags are
fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from emo_serve import __version__
from emo_serve.cli.commands import FAILED, REFUSED, adder, refuse
from emo_serve.cli.completion import add_completion_command, complete, is_completing
from emo_serve.cli.early import settings_of
from emo_serve.cli.output import (
    CUT_OFF,
    announce,
    drop_output,
    open_standard_streams,
    run_to_the_last_byte,
)
from emo_serve.cli.parsing import CommandParser
from emo_serve.config import add_serve_flags
from emo_serve.errors import ConfigError, EmoServeError

__all__ = ["main"]

_INTERRUPTED_STATUS = 130
_SERVE_EPILOG = """\
Any flag of `vllm serve` may follow, with its name and default: --port, --dtype, --api-key,
--max-model-len, --served-model-name, --tensor-parallel-size, ... Only --host differs: without it
the server listens on 127.0.0.1, not on every interface.

  emo-serve serve --help=all          list them all
  emo-serve serve --help=max-model-len  explain one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; 2 for anything the user must change."""
    if is_completing():
        complete(_parser())
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_server = arguments[:1] == ["serve"] and not _asks_short_help(arguments[1:])
    open_standard_streams()
    try:
        if is_server:
            return _serve(arguments[1:])
        return run_to_the_last_byte(lambda: _run(arguments))
    except EmoServeError as error:
        return refuse(error, REFUSED if isinstance(error, ConfigError) else FAILED)
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS
    except OSError as error:
        if is_server or error.filename is not None:  # not an error of writing to a stream
            raise
        drop_output()
        if isinstance(error, BrokenPipeError):
            return CUT_OFF
        return refuse(EmoServeError(f"standard output: {error.strerror or error}"), FAILED)


def _run(arguments: Sequence[str]) -> int:
    from emo_serve.cli.cluster import split_arguments

    ours, of_replicas = split_arguments(arguments)
    args = _parser().parse_args(ours)
    args.of_replicas = of_replicas
    return int(args.run(args) or 0)


def _asks_short_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _parser() -> argparse.ArgumentParser:
    from emo_serve import demo
    from emo_serve.cli.chat import add_chat_command
    from emo_serve.cli.cluster import add_cluster_parser
    from emo_serve.cli.demo import add_demo_parser
    from emo_serve.cli.doctor import add_doctor_command
    from emo_serve.cli.pools import add_pools_parser

    parser: argparse.ArgumentParser = CommandParser(
        prog="emo-serve",
        description="Serve EMO models: one vLLM engine, many expert pools, the OpenAI API.",
    )
    parser.add_argument("--version", action="version", version=f"emo-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="start the OpenAI-compatible server",
        usage="emo-serve serve [MODEL] [flags] [any flag of vllm serve]",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help="checkpoint directory or Hub id (default: the small shipped model)",
    )
    add_serve_flags(serve)
    add_cluster_parser(commands)
    add_pools_parser(commands, demo.model_dir())
    add = adder(commands)
    add_chat_command(add)
    add_doctor_command(add)
    add_demo_parser(commands)
    add_completion_command(add)
    return parser


def _serve(arguments: list[str]) -> int:
    settings_of(arguments)  # refuses bad values at once
    from emo_serve.server.startup.quiet import be_quiet, is_quiet, log_to_stderr

    log_to_stderr()
    quiet = is_quiet(arguments)
    if quiet:
        be_quiet()
    from emo_serve.server.serve import run
    from emo_serve.server.shipped import shipped_model

    return run(arguments, announce, shipped_model(), is_quiet=quiet)


if __name__ == "__main__":
    sys.exit(main())
