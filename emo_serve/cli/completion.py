"""Completion in bash, zsh and fish, by argcomplete: `eval "$(emo-serve completion bash)"`.

The shell runs emo-serve at each Tab with the line typed so far, and argcomplete answers from the
parser. Names of pools come from the server or the directory that the line names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emo_serve.cli.commands import AddCommand
from emo_serve.errors import ConfigError

__all__ = [
    "add_completion_command",
    "complete",
    "completed_by",
    "files_that_begin",
    "is_completing",
    "pools_of_directory",
]

_SHELLS = ("bash", "zsh", "fish")
_EPILOG = """\
Once per shell, or in its start-up file:
  bash   eval "$(emo-serve completion bash)"          in ~/.bashrc
  zsh    eval "$(emo-serve completion zsh)"           in ~/.zshrc, after compinit
  fish   emo-serve completion fish | source           in ~/.config/fish/config.fish
"""

_Completer = Callable[..., list[str]]


def add_completion_command(add: AddCommand) -> None:
    """Add the command."""
    command = add("completion", _run, "print what makes a shell complete these commands")
    command.epilog = _EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("shell", choices=_SHELLS, help=" or ".join(_SHELLS))


def _run(arguments: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["emo-serve"], shell=arguments.shell))
    return 0


def is_completing() -> bool:
    """Tell whether a shell asks for completions, and not for a command to run."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process."""
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options=False)


def completed_by(action: argparse.Action, completer: _Completer) -> None:
    """Let a shell complete an argument by `completer`, which gets `parsed_args` by name."""
    action.completer = completer  # type: ignore[attr-defined]


def files_that_begin(prefix: str) -> list[str]:
    """Return the paths that begin with what was typed."""
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter()(prefix))


def pools_of_directory(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the names of the pools of the directory given with --pools."""
    from emo_serve.pools.catalog import PoolCatalog

    if parsed_args.pools is None:
        return []
    try:
        return list(PoolCatalog.read(Path(parsed_args.pools)).pools)
    except ConfigError:  # nobody could be told
        return []
