"""POST /v1/pools with examples, over ASGI: what comes out, and what is refused in which words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from emo_serve.errors import EmoServeError, RequestError
from emo_serve.pools.document import BuildRequest, is_build, parse_build
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.api import MAX_DOCUMENT_BYTES, create_router
from tests.support.build_world import K, World, texts
from tests.support.golden.checkpoints import write_checkpoint
from tests.support.one_thread import one_thread

__all__ = ["one_thread"]

CHAT = {"messages": [{"role": "user", "content": "one and one"}]}
BUILD: dict[str, Any] = {"name": "math", "examples": ["one and one", CHAT], "experts": K}


def to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("golden"))


@pytest.fixture
def world(directory: Path) -> World:
    return World(directory)


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(create_router(world.service, to_http_error, world.builder))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_the_answer_is_the_card_and_what_was_found(
    world: World, client: httpx.AsyncClient
) -> None:
    document = {**BUILD, "examples": [example.text for example in texts()], "description": "sums"}
    answer = await client.post("/v1/pools", json=document)
    assert answer.status_code == 201, answer.text
    built, expected = answer.json(), world.offline()
    made = built.pop("calibration")
    notes = built.pop("notes")
    card = (await client.get("/v1/pools")).json()["data"][-1]
    assert built == card, "the same card as everywhere"
    assert (card["name"], card["description"], card["version"]) == ("math", "sums", 1)
    assert card["experts_per_layer"] == [0, K, K]
    assert made.pop("seconds") > 0
    assert made.pop("coverage") == pytest.approx(expected.coverage)
    dense, *shares = made.pop("coverage_per_layer")
    assert dense is None
    assert shares == pytest.approx([layer.coverage for layer in expected.layers if layer])
    assert made == {
        "method": "layerwise",
        "documents": 3,
        "tokens": 90,
        "documents_cut": 0,
        "tokens_cut": 0,
        "experts": K,
    }
    assert [note[:27] for note in notes] == ["90 tokens are little text: "]
    again = await client.post("/v1/pools", json=document)
    assert (again.status_code, "replace=true" in again.text) == (409, True)
    again = await client.post("/v1/pools?replace=true", json={**document, "router_temperature": 2})
    assert (again.status_code, again.json()["version"]) == (200, 2)
    assert again.json()["router_temperature"] == 2.0


async def test_examples_are_strings_texts_and_chats(
    world: World, client: httpx.AsyncClient
) -> None:
    examples = ["one", {"text": "two", "id": 7}, CHAT]
    answer = await client.post("/v1/pools", json={**BUILD, "examples": examples})
    assert answer.json()["calibration"]["documents"] == 3
    documents = parse_build({**BUILD, "examples": examples}).documents
    assert [example.text for example in documents] == ["one", "two", None]
    assert list(documents[2].messages) == CHAT["messages"]
    assert documents[2].source == "body.examples[2]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Math"}, "body: name is 'Math'; expected 1 to 64 of"),
        ({"name": 3}, "body: name is 3"),
        ({"examples": []}, "body: examples is []; expected a list of texts or chats, at least one"),
        ({"examples": "one"}, "body: examples is 'one'; expected a list"),
        ({"examples": ["one", " "]}, "body: examples[1].text is ' '; expected some text"),
        ({"examples": ["one", 3]}, "body: examples[1] is 3; expected a string, or an object with"),
        (
            {"examples": [{"messages": []}]},
            "body: examples[0].messages is []; expected a list of messages",
        ),
        (
            {"examples": [{"prompt": "x"}]},
            "body: examples[0] is {'prompt': 'x'}; expected a string, or",
        ),
        ({"experts": "6"}, "body: experts is '6'; expected how many experts per layer to keep"),
        ({"experts": True}, "body: experts is True"),
        ({"experts": 6.0}, "body: experts is 6.0"),
        ({"experts": 25}, "a pool of 25 experts per layer is more than the model has: 24"),
        ({"experts": 1}, "a pool of 1 experts per layer is too small: layer 1 needs at least 2"),
        ({"method": "random"}, "body: method is 'random'; expected 'layerwise' or 'router'; a"),
        ({"description": 3}, "body: description is 3; expected a string"),
        ({"router_temperature": 0}, "body: router_temperature is 0; expected a finite number"),
        ({"router_temperature": "1"}, "body: router_temperature is '1'"),
        ({"seed": 3}, "body: a key of the build is 'seed'; expected one of name, examples,"),
        ({"layers": []}, "body: a key of the file is 'examples'; expected one of format, name,"),
    ],
)
async def test_a_bad_build_is_refused_with_field_and_value(
    world: World, client: httpx.AsyncClient, change: dict[str, Any], message: str
) -> None:
    answer = await client.post("/v1/pools", json=BUILD | change)
    assert (answer.status_code, message in answer.json()["detail"]) == (400, True), answer.text
    assert (world.probe.calls, list(world.service.catalog.pools)) == (0, [])


@pytest.mark.parametrize("missing", ["name", "examples", "experts"])
async def test_what_is_missing_is_named(client: httpx.AsyncClient, missing: str) -> None:
    document = {key: value for key, value in BUILD.items() if key != missing}
    answer = await client.post("/v1/pools", json=document)
    assert f"body: '{missing}' is missing from the build" in answer.json()["detail"]


async def test_a_pool_larger_than_the_slab_is_refused(directory: Path) -> None:
    world = World(directory, slots=4)
    app = FastAPI()
    app.include_router(create_router(world.service, to_http_error, world.builder))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/pools", json=BUILD)
    assert (answer.status_code, "layer 1 needs 6 slots and has 4" in answer.text) == (400, True)


async def test_examples_have_the_limit_of_documents(client: httpx.AsyncClient) -> None:
    body = json.dumps({**BUILD, "examples": ["x" * MAX_DOCUMENT_BYTES]})
    answer = await client.post("/v1/pools", content=body)
    assert (answer.status_code, f"larger than {MAX_DOCUMENT_BYTES} bytes" in answer.text) == (
        413,
        True,
    )


async def test_without_a_builder_the_offline_way_is_named(world: World) -> None:
    app = FastAPI()
    app.include_router(create_router(world.service, to_http_error))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/pools", json=BUILD)
    assert (answer.status_code, "use emo-serve pools build" in answer.text) == (503, True)


def test_a_pool_is_not_a_build() -> None:
    assert is_build(BUILD)
    assert is_build({"examples": []})
    assert not is_build({"format": "emo-pool/1", "name": "a", "layers": [], "examples": []})
    assert not is_build({})
    assert not is_build([BUILD])


def test_every_field_of_a_build_is_read_and_described() -> None:
    document = {
        **BUILD,
        "examples": ["one", {"text": "two"}, CHAT],
        "method": "layerwise",
        "description": "all fields",
        "router_temperature": 2.0,
    }
    request = parse_build(document)
    assert (request.name, request.experts, request.description) == ("math", K, "all fields")
    assert (request.method, request.router_temperature) == ("layerwise", 2.0)
    assert [example.as_json() for example in request.documents] == ["one", "two", CHAT]
    schema = BuildRequest.model_json_schema()
    assert set(schema["properties"]) == set(document)
    assert set(schema["required"]) == {"name", "examples", "experts"}
    for bad in ({**document, "more": 1}, {**document, "examples": []}, {"name": "math"}):
        with pytest.raises(RequestError):
            parse_build(bad)


def test_a_message_keeps_what_only_the_models_template_reads() -> None:
    message = {"role": "user", "content": "hi", "name": "Ada"}
    request = parse_build({**BUILD, "examples": [{"messages": [message], "id": 3}]})
    assert request.documents[0].as_json() == {"messages": [message]}
