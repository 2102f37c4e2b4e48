"""Requests that vLLM 0.32.0 answers with 5xx or not to the end, and what emo-serve answers.

Each row was run against plain vLLM with the same model; docs/development.md has the command. Our
layers refuse them all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.abuse.asking import Answer, Asked, status_of

__all__ = ["FAULTS", "TORN", "FaultOfVllm", "shown_status"]

TORN = 0
"""Stands for a stream that began with 200 and broke off, without an event that says why."""

_TEXT = {"prompt": "hi", "max_tokens": 2}
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
_RESPONSE = {"input": "hi", "max_output_tokens": 16}
_STREAM = {"stream": True}
_ENDLESS = {"structured_outputs": {"grammar": "root ::= root"}}
_ENDLESS_SCHEMA = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"$ref": "#"}},
    }
}
_LARGE = {"top_k": 10**400}
_HALF = {"stop": "\ud800"}
_AGAINST = {"structured_outputs": {"json": {"type": "object"}}, "allowed_token_ids": [0]}


@dataclass(frozen=True)
class FaultOfVllm:
    """One request; `vllm` is the status of its answer there; ours is 400.

    A body is bytes, or fields that the model's name is added to.
    """

    about: str
    path: str
    body: Any
    vllm: int = 500

    def asked(self, model: str) -> Asked:
        """Return the request."""
        is_whole = isinstance(self.body, bytes)
        body = self.body if is_whole else json.dumps({"model": model, **self.body}).encode()
        return Asked(self.path, body, self.about)


FAULTS = (
    *(
        FaultOfVllm("a validator takes structured_outputs for an object", path, {**body, **wrong})
        for path, body in (("/v1/completions", _TEXT), ("/v1/chat/completions", _CHAT))
        for wrong in ({"structured_outputs": "json"}, {"structured_outputs": [[]], **_STREAM})
    ),
    FaultOfVllm("a grammar without an end", "/v1/completions", {**_TEXT, **_ENDLESS}),
    FaultOfVllm("the same, streamed", "/v1/completions", {**_TEXT, **_ENDLESS, **_STREAM}),
    FaultOfVllm("a schema without an end", "/v1/chat/completions", {**_CHAT, **_ENDLESS_SCHEMA}),
    FaultOfVllm(
        "the same, streamed",
        "/v1/chat/completions",
        {**_CHAT, **_ENDLESS_SCHEMA, **_STREAM},
    ),
    FaultOfVllm("the same in a response", "/v1/responses", {**_RESPONSE, **_ENDLESS}),
    FaultOfVllm("a text that UTF-8 cannot hold", "/v1/completions", {**_TEXT, **_HALF}),
    FaultOfVllm("the same, streamed", "/v1/chat/completions", {**_CHAT, **_HALF, **_STREAM}),
    FaultOfVllm("the same in a response", "/v1/responses", {**_RESPONSE, **_HALF, **_STREAM}, TORN),
    FaultOfVllm("a number beyond 64 bits", "/v1/completions", {**_TEXT, **_LARGE}),
    FaultOfVllm("the same, streamed", "/v1/completions", {**_TEXT, **_LARGE, **_STREAM}),
    FaultOfVllm("the same in a response", "/v1/responses", {**_RESPONSE, **_LARGE}),
    FaultOfVllm("JSON that is nested too deeply", "/invocations", b"[" * 100_000),
    FaultOfVllm("a body that is no object", "/scale_elastic_ep", b"[]"),
    FaultOfVllm(
        "an error after a stream of /v1/messages has begun is not written as its event",
        "/v1/messages",
        {**_CHAT, **_LARGE, **_STREAM},
    ),
    FaultOfVllm(
        "a grammar and allowed tokens that exclude each other",
        "/v1/completions",
        {**_TEXT, **_AGAINST},
    ),
    FaultOfVllm(
        "a stream of /v1/responses begins before the request is checked, and breaks off",
        "/v1/responses",
        {**_RESPONSE, "stop_token_ids": [-1], **_STREAM},
        TORN,
    ),
)


def shown_status(answer: Answer) -> int:
    """Return the status as the table writes it."""
    return TORN if answer.lost else status_of(answer)
