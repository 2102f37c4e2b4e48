"""What a client is told of coverage: its wish, the header, the JSON field, the event."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.errors import RequestError
from emo_serve.server.asgi.coverage import CoverageReport, EventTail, body_with, wants_coverage
from emo_serve.server.coverage import CoverageSum

REPORT = CoverageReport("math", 0.8731, 42)
FIELD = {"pool": "math", "coverage": 0.8731, "routed_tokens": 42}
CHUNK = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "emo:math"}


def event_of(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


# -- the wish --


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], False),
        (["true"], True),
        (["TRUE"], True),
        ([" 1 "], True),
        (["false"], False),
        (["0"], False),
        (["1", "True"], True),
    ],
)
def test_the_header_is_a_word_of_four(values: list[str], wanted: bool) -> None:
    assert wants_coverage(values) is wanted


@pytest.mark.parametrize("values", [["yes"], [""], ["true, true"], ["true", "on"], ["1", "0"]])
def test_anything_else_is_refused_with_what_to_send(values: list[str]) -> None:
    with pytest.raises(RequestError, match=r"^x-emo-coverage is .*; send "):
        wants_coverage(values)


# -- the report --


def test_every_token_counts_the_same_whichever_engine_request_it_is_of() -> None:
    sums = [CoverageSum(0.9, 1), None, CoverageSum(2.1, 3)]
    report = CoverageReport.of("math", sums)
    assert report == CoverageReport("math", 0.75, 4)
    assert report.headers == {"x-emo-coverage": "0.7500"}


def test_nothing_routed_is_a_null_in_the_body_and_no_header() -> None:
    report = CoverageReport.of("math", [None])
    assert report.headers == {}
    field = json.loads(body_with(b"{}", report))["emo_serve"]
    assert field == {"pool": "math", "coverage": None, "routed_tokens": 0}


# -- the body --


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.booleans())
def test_a_json_object_gets_one_more_field(answer: dict[str, object], indented: bool) -> None:
    answer.pop("emo_serve", None)
    body = json.dumps(answer, indent=2 if indented else None).encode()
    pairs = json.loads(body_with(body + b"\n", REPORT), object_pairs_hook=list)
    assert [key for key, _ in pairs] == [*answer, "emo_serve"]
    assert json.loads(body_with(body, REPORT)) == {**answer, "emo_serve": FIELD}


def test_the_rest_of_the_body_is_the_same_bytes() -> None:
    body = b'{"text": "\\u00e9\xc3\xa9", "logprob": -1.10, "choices": [{"a": {}}]}'
    assert body_with(body, REPORT).startswith(body[:-1] + b',"emo_serve":{')


@pytest.mark.parametrize("body", [b"", b"[1, 2]", b'"text"', b"12", b"null", b"\x1f\x8b\x08"])
def test_what_is_no_object_is_left_as_it_is(body: bytes) -> None:
    assert body_with(body, REPORT) == body


# -- the event --


def fed(stream: bytes, cuts: list[int]) -> tuple[EventTail, list[bytes]]:
    """Feed a stream in pieces; return its events."""
    tail = EventTail()
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip(places, places[1:], strict=False)]
    return tail, [event for piece in pieces for event in tail.take(piece)]


@given(st.lists(st.integers(0, 10_000), max_size=8), st.booleans())
def test_a_stream_cut_anywhere_has_the_same_events(cuts: list[int], is_ended: bool) -> None:
    first = event_of({**CHUNK, "choices": [{"text": "a\n\nb"}]})
    second = event_of({**CHUNK, "id": "other", "choices": []})
    end = b"data: [DONE]\n\n" if is_ended else b"data: {"
    tail, events = fed(first + second + end, cuts)
    assert b"".join(events) + tail.rest == first + second + end
    assert [tail.is_last(event) for event in events] == [False, False, True][: 2 + is_ended]
    last = tail.event(REPORT)
    assert last.endswith(b"\n\n")
    assert json.loads(last.removeprefix(b"data: ")) == {**CHUNK, "choices": [], "emo_serve": FIELD}


def test_a_chat_has_its_own_kind_of_chunk() -> None:
    chunk = {**CHUNK, "object": "chat.completion.chunk"}
    tail, _ = fed(event_of(chunk), [])
    assert json.loads(tail.event(REPORT)[6:])["object"] == "chat.completion.chunk"


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        event_of({"error": {"message": "no"}}),
        event_of([1]),
        b"data: {broken\n\n",
        b": a comment\n\n",
        b'event: response.created\ndata: {"type": "response.created"}\n\n',
        event_of({"object": "response"}),
    ],
)
def test_a_stream_without_a_chunk_gets_no_event(stream: bytes) -> None:
    tail, _ = fed(stream, [])
    assert tail.event(REPORT) == b""


def test_the_end_of_a_message_gets_the_field() -> None:
    event = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    tail, _ = fed(b"event: message_start\ndata: {}\n\n" + event, [])
    assert tail.is_last(event)
    line, data, *rest = tail.last(event, REPORT).split(b"\n")
    assert (line, rest) == (b"event: message_stop", [b"", b""])
    fields = json.loads(data.removeprefix(b"data: "))
    assert fields == {"type": "message_stop", "emo_serve": FIELD}


def test_a_completed_response_gets_the_field() -> None:
    event = b'event: response.completed\ndata: {"response":{"id":"r"},"sequence_number":8}\n\n'
    tail, _ = fed(event, [])
    assert tail.is_last(event)
    line, data, *rest = tail.last(event, REPORT).split(b"\n")
    assert (line, rest) == (b"event: response.completed", [b"", b""])
    fields = json.loads(data.removeprefix(b"data: "))
    assert fields == {"response": {"id": "r", "emo_serve": FIELD}, "sequence_number": 8}
