"""`emo-serve chat [POOL]`: talk to a running server in the terminal.

Answers stream. Beside a terminal, the whole of standard input is one message, and only the answer
is printed: `emo-serve chat math < question.txt`. httpx is imported when the command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emo_serve.cli.commands import AddCommand
from emo_serve.cli.completion import completed_by
from emo_serve.cli.rendering.tables import printable
from emo_serve.cli.server_flags import (
    CHANGE_SECONDS,
    LOCAL_SERVER,
    NAME_HELP,
    add_server_flags,
    pools_of_server,
    server_of,
)
from emo_serve.errors import ConfigError, EmoServeError, RequestError, Unavailable

if TYPE_CHECKING:
    from emo_serve.cli.connection import Connection

__all__ = ["Chat", "add_chat_command"]

_HELP = """\
/pool NAME   ask another pool from now on: a pool, a size, a union, or auto; without NAME the model
/new         forget what was said
/help        show this
/quit        end, as Ctrl-D does; Ctrl-C ends an answer"""


def add_chat_command(add: AddCommand) -> None:
    """Add the command."""
    chat = add("chat", _run, "talk to a running server in the terminal")
    pool = chat.add_argument(
        "pool",
        nargs="?",
        metavar="POOL",
        help=f"{NAME_HELP}, or auto (default: the server's default pool)",
    )
    completed_by(pool, pools_of_server)
    chat.add_argument("--system", metavar="TEXT", help="a system prompt")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer at most")
    chat.add_argument("--temperature", type=float, metavar="T", help="0 for the likeliest tokens")
    add_server_flags(chat, seconds=CHANGE_SECONDS, default=LOCAL_SERVER)


@dataclass
class Chat:
    """A conversation with one server; `pool` None is its default pool.

    `last` says in a few words how the newest answer was made.
    """

    server: Connection
    pool: str | None
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    last: str = ""

    def ask(self, text: str) -> Iterator[str]:
        """Yield the pieces of the answer; the turn counts when it has ended, or is ended early.

        Raises RequestError and Unavailable; then nothing was said.
        """
        said = [{"role": "user", "content": text}]
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {
            "messages": [*first, *self.turns, *said],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        if self.pool is not None:
            body["model"] = self.pool
        pieces: list[str] = []
        start, first_at, tokens, coverage = time.monotonic(), None, None, None
        headers = {"x-emo-coverage": "true"}
        try:
            with self.server.events("POST", "/v1/chat/completions", body, headers) as (
                head,
                events,
            ):
                for chunk in _chunks(events):
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    coverage = chunk.get("emo_serve", {}).get("coverage", coverage)
                    for choice in chunk.get("choices", ()):
                        if piece := choice["delta"].get("content"):
                            first_at = first_at or time.monotonic()
                            pieces.append(piece)
                            yield piece
        finally:
            if pieces:
                self.turns += [*said, {"role": "assistant", "content": "".join(pieces)}]
        served = head.headers.get("x-emo-pool", self.pool or "the model")
        self.last = _account(served, tokens, start, first_at, coverage)


def _chunks(events: Iterator[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for _, data in events:
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise Unavailable(printable(str(chunk["error"].get("message", chunk["error"]))))
        yield chunk


def _account(
    pool: str, tokens: int | None, start: float, first_at: float | None, coverage: float | None
) -> str:
    parts = [printable(pool)]
    if first_at is not None:
        parts.append(f"first token after {first_at - start:.2f} s")
        seconds = time.monotonic() - first_at
        if tokens is not None and tokens > 1 and seconds > 0:
            parts.append(f"{tokens} tokens, {(tokens - 1) / seconds:.1f} per second")
    if coverage is not None:
        parts.append(f"coverage {coverage:.2f}")
    return ", ".join(parts)


def _run(arguments: argparse.Namespace) -> int:
    options = {"max_completion_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    given = {name: value for name, value in options.items() if value is not None}
    with server_of(arguments) as server:
        chat = Chat(server, arguments.pool, arguments.system, given)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return _answer_once(chat, sys.stdin.read())
        return _talk(chat)


def _answer_once(chat: Chat, text: str) -> int:
    if not text.strip():
        raise ConfigError("chat: standard input is empty; it is the message to send")
    for piece in chat.ask(text):
        _show(piece)
    _show("\n")
    return 0


def _talk(chat: Chat) -> int:
    import readline  # noqa: F401 - input() then edits lines and remembers them

    asked = printable(chat.pool or "the default pool")
    print(f"{asked} at {chat.server.url}; /help lists commands, Ctrl-D ends")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text in ("/quit", "/exit"):
            return 0
        if text.startswith("/"):
            print(_command(chat, *text.split(maxsplit=1)))
        elif text:
            _answer(chat, text)


def _command(chat: Chat, verb: str, argument: str = "") -> str:
    """Do what a line that begins with / says, and return what to print."""
    if verb == "/pool":
        chat.pool = argument.strip() or None
        return f"asking {printable(chat.pool or 'the default pool')} from now on"
    if verb == "/new":
        chat.turns.clear()
        return "forgotten"
    return _HELP if verb == "/help" else f"there is no command {printable(verb)}\n{_HELP}"


def _answer(chat: Chat, text: str) -> None:
    try:
        for piece in chat.ask(text):
            _show(piece)
        print(f"\n[{chat.last}]")
    except KeyboardInterrupt:
        print("\n[ended]")
    except (RequestError, Unavailable) as error:
        _complain(error)


def _complain(error: EmoServeError) -> None:
    print(f"emo-serve: {' '.join(str(error).split())}")


def _show(piece: str) -> None:
    """Print a piece of an answer, without what would steer the terminal."""
    kept = "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in piece)
    print(kept, end="", flush=True)
