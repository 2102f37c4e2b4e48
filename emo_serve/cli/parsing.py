"""argparse with suggestions: an unknown flag or command is refused together with the nearest one.

argparse reports unknown flags at the top, where the flags of the command are no longer known. Here
each command refuses its own.
"""

from __future__ import annotations

import argparse
from typing import Any

from emo_serve.spelling import did_you_mean, unrecognized

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser of one command, and of the commands below it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse unknown arguments here."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(unrecognized(unknown, self._actions))
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"invalid choice: {value!r} (choose from {', '.join(choices)})"
                + did_you_mean(str(value), choices),
            )
