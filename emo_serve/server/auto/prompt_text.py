"""The text of a request that shows its domain: from each protocol's JSON to a `Prompt`.

For conversations, user turns are read first, in order, and everything else after them. A system
prompt shared by all requests says nothing about the domain, and with the user's first turn at the
start, a conversation keeps its pool. Images, tool calls and other parts without text are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from emo_serve.server.asgi.invocations import INVOCATIONS

__all__ = ["READERS", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """The prompt of a request: its text, or `ids` if the client sent token ids."""

    text: str = ""
    ids: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether there is any text or id."""
        return bool(self.ids) or bool(self.text.strip())


def _of_completion(body: Mapping[str, Any]) -> Prompt:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return Prompt(prompt)
    if not isinstance(prompt, list):
        return Prompt()
    if all(isinstance(part, str) for part in prompt):
        return Prompt("\n".join(prompt))
    lists = prompt if all(isinstance(part, list) for part in prompt) else [prompt]
    ids = [token for part in lists for token in part]
    return Prompt(ids=tuple(ids)) if all(type(token) is int for token in ids) else Prompt()


def _of_chat(body: Mapping[str, Any]) -> Prompt:
    return _conversation(body.get("messages"))


def _of_response(body: Mapping[str, Any]) -> Prompt:
    given = body.get("input")
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return _conversation(turns, body.get("instructions"))


def _of_message(body: Mapping[str, Any]) -> Prompt:
    return _conversation(body.get("messages"), body.get("system"))


def _of_invocation(body: Mapping[str, Any]) -> Prompt:
    return _of_chat(body) if "messages" in body else _of_completion(body)


def _of_count(_: Mapping[str, Any]) -> Prompt:
    return Prompt()  # all pools count alike


READERS: Mapping[str, Callable[[Mapping[str, Any]], Prompt]] = {
    "/v1/completions": _of_completion,
    "/v1/chat/completions": _of_chat,
    "/v1/responses": _of_response,
    "/v1/messages": _of_message,
    "/v1/messages/count_tokens": _of_count,
    INVOCATIONS: _of_invocation,
}
"""Prompt readers by path; each returns an empty prompt for a body that it cannot read."""


def _conversation(turns: object, system: object = None) -> Prompt:
    known = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    users = [turn.get("content") for turn in known if turn.get("role") == "user"]
    others = [turn.get("content") for turn in known if turn.get("role") != "user"]
    return Prompt("\n".join(_texts([*users, system, *others])))


def _texts(contents: Iterable[object]) -> Iterable[str]:
    """Yield the text of each content, which is a string or a list of parts."""
    for content in contents:
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
