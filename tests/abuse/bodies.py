"""Bodies to send: valid ones of every route, one-field mutations of them, and bad ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.abuse.asking import Asked

__all__ = ["BAD_BODIES", "VALUES", "fields_of", "mutations", "post_paths", "valid_bodies"]

_HI = [{"role": "user", "content": "hi"}]
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
_ANTHROPIC_TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_LAYER = {"experts": [0, 1, 2, 3, 4, 5, 6, 7]}
_POOL = {
    "format": "emo-pool/1",
    "name": "abused",
    "layers": [_LAYER] * 4,
    "description": "made by a test",
    "router_temperature": 1.0,
    "model": {"name": "emo-demo", "implied": [[31]] * 4},
    "calibration": {"method": "layerwise", "documents": 1, "tokens": 9, "seed": 0, "experts": 8},
}
_BUILD = {
    "name": "abused",
    "examples": ["def add(a, b):", {"text": "return a"}, {"messages": _HI}],
    "experts": 8,
    "description": "built by a test",
}


def valid_bodies(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Return routes that take a POST, each with bodies that are answered with 200."""
    short, named = {"max_tokens": 2}, {"model": model}
    chat = {**named, **short, "messages": _HI}
    guided = {"structured_outputs": {"json": _SCHEMA}}
    typed = {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}}
    text = {**named, **short, "prompt": "hi"}
    response = {**named, "input": "hi", "max_output_tokens": 16}
    question = {"type": "choice", "criteria": {"a": "first", "b": "second"}}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return [
        ("/v1/completions", text),
        ("/v1/completions", {**text, **guided}),
        ("/v1/completions", {**text, **streamed, "response_format": typed}),
        ("/v1/chat/completions", {**chat, "tools": [_TOOL], "tool_choice": "none"}),
        ("/v1/chat/completions", {**chat, "response_format": typed}),
        ("/v1/chat/completions", {**chat, **streamed, **guided}),
        ("/v1/chat/completions/batch", {**chat, "messages": [_HI, _HI]}),
        ("/v1/responses", response),
        ("/v1/responses", {**response, "input": _HI, "text": {"format": {"type": "text"}}}),
        ("/v1/responses", {**response, "stream": True}),
        ("/v1/messages", {**chat, "system": "be short", "tools": [_ANTHROPIC_TOOL]}),
        ("/v1/messages", {**chat, "stream": True}),
        ("/v1/messages/count_tokens", {**named, "messages": _HI}),
        ("/v1/systemone", {**named, "state": "hi", "questions": {"q": question}}),
        ("/generative_scoring", {**named, "query": "a", "items": ["b"], "label_token_ids": [1, 2]}),
        ("/tokenize", {**named, "prompt": "hi"}),
        ("/tokenize", {**named, "messages": _HI}),
        ("/detokenize", {**named, "tokens": [1, 2]}),
        ("/invocations", text),
        ("/invocations", chat),
        ("/v1/pools?replace=true", _POOL),
        ("/v1/pools?replace=true", _BUILD),
        # the default pool, so that there is always room for one more
        ("/v1/pools/python/load", {"pin": False}),
        ("/v1/pools/math/evict", {"drain": False}),
        ("/v1/pools/python/pin", {}),
        ("/v1/pools/python/unpin", {}),
    ]


# -- one field changed --

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1.5, 1e-40),
    *("", " ", "x", "\x00", "\ud800", "a" * 5000, "auto", "json"),
    *([], [[]], [0], [-1], [2**40], ["x"], [""], [None], [{}], [["a"] * 3]),
    *({}, {"a": 1}, {"": ""}, {"1": 200}, {"999999999": 5}, {"x": "y"}, {"type": "x"}),
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "bananas"}}},
    {"type": "structural_tag", "format": {"type": "x"}},
    {"regex": "(a{1,30}){1,30}b"},
    {"regex": "("},
    {"json": {"$ref": "#"}},
    {"json": {"type": "object", "properties": 7}},
    {"json": "{"},
    {"grammar": "root ::= root"},
    {"grammar": "root ::= "},
    {"choice": []},
    {"choice": [""]},
    {"structural_tag": "{}"},
    [{"role": "tool", "content": None}],
    [{"role": "x", "content": "x"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"type": "function", "function": {"name": "f"}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "bananas"}}}],
)
"""What a field becomes: wrong types, bounds, texts that are no text, shapes of other fields."""


def mutations(document: dict[str, Any], model: str, seed: int) -> list[Asked]:
    """Return every valid body with one field changed, in an order that the seed decides.

    The fields are those that the OpenAPI document lists for the route, and every place inside the
    body: of a list, the first.
    """
    found = list(_mutations(document, model))
    random.Random(seed).shuffle(found)
    return found


def _mutations(document: dict[str, Any], model: str) -> Iterator[Asked]:
    for path, body in valid_bodies(model):
        described = path.partition("?")[0].replace("/math/", "/{name}/")
        described = described.replace("/python/", "/{name}/")
        if described == "/invocations":  # which takes the bodies of several routes
            described = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        known = fields_of(document, described)
        places = [*_places(body), *((name,) for name in known if name not in body)]
        for place in places:
            for value in VALUES:
                changed = json.dumps(_changed(body, place, value)).encode()
                yield Asked(path, changed, f"{'.'.join(map(str, place))} = {_short(value)}")
            if place[-1] in body:
                yield Asked(path, json.dumps(_without(body, place)).encode(), f"no {place[-1]}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _places(node: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    inside = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list):
        inside = list(enumerate(node))[:1]
    for key, value in inside:
        yield (*above, key)
        yield from _places(value, (*above, key))


def _changed(node: Any, place: tuple[str | int, ...], value: Any) -> Any:
    if not place:
        return value
    key, rest = place[0], place[1:]
    copy = node.copy()
    copy[key] = _changed(node[key] if rest else None, rest, value)
    return copy


def _without(body: dict[str, Any], place: tuple[str | int, ...]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != place[-1]}


# -- the server's own description --


def post_paths(document: dict[str, Any]) -> list[str]:
    """Return the paths that take a POST, with names in the places of parameters."""
    names = {"{name}": "python", "{response_id}": "resp_none"}
    found = []
    for path, methods in document["paths"].items():
        for parameter, name in names.items():
            path = path.replace(parameter, name)
        if "post" in methods:
            found.append(path)
    return found


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    """Return the fields of a route's body, of all its alternatives together."""
    operation = document["paths"].get(path, {}).get("post", {})
    content = operation.get("requestBody", {}).get("content", {})
    found: dict[str, None] = {}
    pending = [content.get("application/json", {}).get("schema", {})]
    for schema in pending:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            schema = document["components"]["schemas"][name]
        found.update(dict.fromkeys(schema.get("properties", {})))
        pending += schema.get("anyOf", [])
    return list(found)


# -- bad bodies --


def _with(value: bytes) -> bytes:
    """Return a body that several routes can read, with one JSON text in all their fields."""
    return (
        b'{"model": "python", "prompt": %(v)b, "input": %(v)b, "query": %(v)b, "items": [%(v)b],'
        b' "name": %(v)b, "state": %(v)b, "messages": [{"role": "user", "content": %(v)b}],'
        b' "max_tokens": 1, "max_output_tokens": 16}'
    ) % {b"v": value}


_VALID = _with(b'"a"')

BAD_BODIES: dict[str, bytes] = {
    "no body": b"",
    "cut off": b'{"a":',
    "cut off in a text": _VALID[:40],
    "100,000 lists in each other": b"[" * 100_000,
    "50,000 objects in each other": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "zero bytes": b"\x00\x00",
    "a zero byte in a text": _with(b'"a\x00b"'),
    "an escaped zero in a text": _with(b'"a\\u0000b"'),
    "no UTF-8": _with(b'"\xff\xfe\xc3("'),
    "UTF-16": _VALID.decode().encode("utf-16"),
    "half a surrogate pair": _with(b'"\\ud800"'),
    "half a surrogate pair as model": _VALID.replace(b"python", b"\\ud800"),
    "a key given twice": b'{"model": "python", "model": "nope", ' + _VALID[1:],
    "NaN": _VALID[:-1] + b', "temperature": NaN, "router_temperature": NaN}',
    "a number beyond floats": _VALID[:-1] + b', "temperature": 1e999, "router_temperature": 1e999}',
    "5,000 digits": _VALID[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
    "a number": b"1",
    "a text": b'"x"',
    "a list": b"[]",
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf" + _VALID,
}
