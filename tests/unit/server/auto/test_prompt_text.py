"""From each protocol's JSON to the text that tells the domain."""

from __future__ import annotations

from typing import Any

import pytest

from emo_serve.server.auto.prompt_text import READERS, Prompt

SYSTEM = {"role": "system", "content": "be kind"}
PARTS = [
    {"type": "text", "text": "see"},
    {"type": "image_url", "image_url": {"url": "data:x"}},
    {"type": "text", "text": "this"},
]


@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        ("completions", {"prompt": "1 + 1"}, Prompt("1 + 1")),
        ("completions", {"prompt": ["1 + 1", "2 + 2"]}, Prompt("1 + 1\n2 + 2")),
        ("completions", {"prompt": [5, 6]}, Prompt(ids=(5, 6))),
        ("completions", {"prompt": [[5, 6], [7]]}, Prompt(ids=(5, 6, 7))),
        (
            "chat/completions",
            {"messages": [SYSTEM, {"role": "user", "content": "hi"}]},
            Prompt("hi\nbe kind"),
        ),
        (
            "chat/completions",
            {
                "messages": [
                    {"role": "user", "content": PARTS},
                    {"role": "assistant", "content": None, "tool_calls": []},
                    {"role": "user", "content": "well?"},
                ]
            },
            Prompt("see\nthis\nwell?"),
        ),
        ("responses", {"input": "hi", "instructions": "be kind"}, Prompt("hi\nbe kind")),
        (
            "responses",
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                    {"type": "reasoning", "summary": []},
                ]
            },
            Prompt("hi"),
        ),
        (
            "messages",
            {
                "system": [{"type": "text", "text": "be kind"}],
                "messages": [{"role": "user", "content": "hi"}],
            },
            Prompt("hi\nbe kind"),
        ),
    ],
)
def test_the_users_words_come_first(path: str, body: dict[str, Any], prompt: Prompt) -> None:
    assert READERS[f"/v1/{path}"](body) == prompt


@pytest.mark.parametrize("path", READERS)
@pytest.mark.parametrize(
    "value", [None, 7, "", "  ", [], [None], [[]], [1.5], [True], [-1, "a"], {"a": 1}, [{"a": 1}]]
)
def test_what_cannot_be_read_is_an_empty_prompt(path: str, value: object) -> None:
    body = {"prompt": value, "messages": value, "input": value}
    assert not READERS[path](body)
    assert not READERS[path]({})
