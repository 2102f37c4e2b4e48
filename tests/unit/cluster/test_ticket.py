"""A proxy's ticket says what a request asks for, whatever its body is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from emo_serve.cluster.ticket import NO_TICKET, Ticket, model_in, ticket_for


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "math"}', "math"),
        (b'{"prompt": "a \\"model\\": \\"code\\"", "model": "math"}', "math"),
        (b'{"metadata": {"model": "code"}}', None),
        (b'{"model": 7}', None),
        (b"[]", None),
        (b"{", None),
        (b"", None),
        (b"\xff", None),
    ],
)
def test_the_model_is_read_from_a_body(body: bytes, model: str | None) -> None:
    assert model_in(body) == model


def test_a_long_body_is_searched() -> None:
    body = json.dumps({"prompt": "x" * 2**20, "model": "math+code"}).encode()
    assert model_in(body) == "math+code"
    assert model_in(json.dumps({"prompt": "x" * 2**20}).encode()) is None


@pytest.mark.parametrize(
    ("method", "path", "ticket"),
    [
        ("POST", "/v1/completions", Ticket("math", ("law",))),
        ("GET", "/v1/models", NO_TICKET),
        ("GET", "/v1/pools", NO_TICKET),
        ("GET", "/v1/pools/math", NO_TICKET),
        ("POST", "/v1/pools", Ticket(is_change=True)),
        ("DELETE", "/v1/pools/math", Ticket(is_change=True)),
        ("POST", "/v1/pools/math/load", Ticket(is_change=True)),
        ("POST", "/v1/poolsides", Ticket("math", ("law",))),
    ],
)
def test_what_a_request_is_for(method: str, path: str, ticket: Ticket) -> None:
    found = ticket_for(method, path, b"a=b", ("law",), b'{"model": "math"}')
    assert found == ticket
    assert Ticket.decode(found.encode()) == found
    there = ticket_for(method, path, b"replica=r1", ("law",), b'{"model": "math"}')
    assert there == replace(ticket, replica="r1")
    assert Ticket.decode(there.encode()) == there


@pytest.mark.parametrize("text", ["", "math", "[]", "[1", '{"a": 1}', "[1, 2, 3]", "[1, 2, 3, 4]"])
def test_what_is_no_ticket_asks_for_nothing(text: str) -> None:
    assert Ticket.decode(text) == NO_TICKET


def test_tickets_fit_into_a_header() -> None:
    assert Ticket("x" * 5000).encode() == ""
    assert Ticket("caf\u00e9\n").encode().isascii()
    assert "\n" not in Ticket("a\nb").encode()
