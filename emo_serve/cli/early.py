"""Reading our own flags before vLLM is imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emo_serve.config import ServeSettings, add_serve_flags

__all__ = ["settings_of"]


def settings_of(arguments: Sequence[str]) -> ServeSettings:
    """Return our settings among the flags of `emo-serve serve`; raises ConfigError."""
    parser = argparse.ArgumentParser(prog="emo-serve serve", add_help=False, allow_abbrev=False)
    add_serve_flags(parser)
    parser.set_defaults(model_tag=None)
    known, _ = parser.parse_known_args(arguments)
    return ServeSettings.from_args(known)
