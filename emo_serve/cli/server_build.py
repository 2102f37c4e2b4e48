"""`emo-serve pools build --server URL`: have a running server build a pool from examples here.

The files are read and checked here and sent as one request, which returns when the pool is defined.
Meanwhile the server's stream of events tells how far it is, for a bar in a terminal. The output is
that of an offline build, without the experts read from the checkpoint. Mixed domains are detected
between documents, not between their passages.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from emo_serve.cli.progress import progress_of
from emo_serve.cli.rendering.outcome import coverage_line, found_by, size_line
from emo_serve.cli.rendering.tables import facts, printable
from emo_serve.cli.server_flags import server_of
from emo_serve.errors import ConfigError, EmoServeError
from emo_serve.names import check_pool_name
from emo_serve.pools.calibration import DEFAULT_METHOD
from emo_serve.pools.calibration.examples import read_examples
from emo_serve.pools.limits import check_text

__all__ = ["run_server_build"]

_METHODS = (DEFAULT_METHOD, "router")
_LAST_WORD_SECONDS = 2.0  # the stream tells of a pool that is defined within one


def run_server_build(arguments: argparse.Namespace) -> int:
    """Send the examples, wait for the pool, and describe it."""
    _check(arguments)
    document = {
        "name": arguments.name,
        "examples": [example.as_json() for example in read_examples(arguments.examples)],
        "experts": arguments.experts,
        "method": arguments.method,
        "description": arguments.description,
    }
    with server_of(arguments) as server, _followed(arguments):
        card = server.add(json.dumps(document).encode(), replace=arguments.replace)
        url = server.url
    made = card["calibration"]
    stored = "stored" if card["persisted"] else "not stored: lasts until the server stops"
    rows = {
        "built": f"version {card['version']}, {stored}",
        "pool": size_line(card["name"], card["experts_per_layer"]),
        "server": url,
        "found by": found_by(made["method"], made["documents"], made["tokens"]),
        "coverage": coverage_line(made["coverage"], made["coverage_per_layer"]),
        "took": f"{made['seconds']:.1f} s",
    }
    print(facts(rows))
    for note in card["notes"]:
        print(f"note: {printable(note)}")
    print(f'\nthen ask:    "model": "{card["name"]}"')
    return 0


@contextmanager
def _followed(arguments: argparse.Namespace) -> Iterator[None]:
    """Show how far the server is, as long as the block runs; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()
    with progress_of(f"building {arguments.name}") as tell:
        # It reads until the server says something more, or the process ends.
        follower = threading.Thread(target=_follow, args=(arguments, tell, is_over), daemon=True)
        follower.start()
        try:
            yield
        finally:
            is_over.set()
            follower.join(_LAST_WORD_SECONDS)


def _follow(
    arguments: argparse.Namespace, tell: Callable[[int, int], None], is_over: threading.Event
) -> None:
    was_seen = False
    with suppress(EmoServeError), server_of(arguments) as server, server.follow() as events:
        for kind, document in events:
            if is_over.is_set():
                return
            if kind != "pools":
                continue
            building = document["building"]
            if building is not None and building["name"] == arguments.name:
                was_seen = True
                tell(building["done"], building["total"])
            elif was_seen:
                return


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go with --server, and an invalid name."""
    check_pool_name("pools build", arguments.name)
    check_text("pools build", "description", arguments.description)
    if arguments.method not in _METHODS:
        raise ConfigError(
            f"pools build: a server builds only by {' or '.join(_METHODS)}; for --method"
            f" {arguments.method} give --model DIR and no --server"
        )
    for flag in ("model", "out", "seed"):
        if getattr(arguments, flag) is not None:
            raise ConfigError(
                f"pools build: --{flag} is for a build from a checkpoint and --server is not; give"
                " one"
            )
    if not arguments.examples:
        raise ConfigError("pools build: give --examples FILE, texts or chats of the domain")
