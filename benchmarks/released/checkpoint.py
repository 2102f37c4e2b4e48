"""The checkpoint that a program of this package measures: one that exists, or a random one."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.random_checkpoint import RELEASED, write_checkpoint

__all__ = ["checkpoint_of"]


@contextmanager
def checkpoint_of(args: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Yield a place in `args.directory`, and `args.model` or a checkpoint of `args.layers` there.

    What is in the place is deleted at the end; `args.layers` becomes what the checkpoint has.
    """
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        place = Path(directory)
        model = args.model or write_checkpoint(
            place / "model", RELEASED | {"num_hidden_layers": args.layers}
        )
        args.layers = int(json.loads((model / "config.json").read_text())["num_hidden_layers"])
        yield place, model
