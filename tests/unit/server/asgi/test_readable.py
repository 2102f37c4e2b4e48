"""Bodies that vLLM's routes fail on are refused with 400, in the shape of the route."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, TypeAdapter, model_validator

from emo_serve.server.asgi.bodies import BodyLimit
from emo_serve.server.asgi.readable import ReadableBody


class Asked(BaseModel):
    """As vLLM's requests: a validator that takes a field for a dictionary."""

    prompt: Any = ""
    guided: Any = None

    @model_validator(mode="before")
    @classmethod
    def check(cls, data: Any) -> Any:
        if data.get("guided"):
            data["guided"].get("json")
        return data


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()

    @app.post("/v1/completions")
    @app.post("/v1/messages")
    async def complete(asked: Asked) -> Asked:
        if asked.prompt == "bug":
            raise AttributeError("of the route")
        return asked

    @app.post("/invocations")
    async def invoke(request: Request) -> Asked:
        return TypeAdapter(Asked).validate_python(await request.json())

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "begun"
            TypeAdapter(Asked).validate_python({"guided": "x"})

        return StreamingResponse(parts())

    # where the server puts it: between the middleware, which answers what is raised, and the routes
    app.router.middleware_stack = BodyLimit(ReadableBody(app.router.middleware_stack), 10**6)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


def sent(text: str) -> dict[str, Any]:
    return {"content": text, "headers": {"content-type": "application/json"}}


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
@pytest.mark.parametrize("guided", ['"x"', "1", "[[]]", "true"])
async def test_a_validator_that_fails_on_a_type_is_the_bodys_fault(
    http: httpx.AsyncClient, path: str, guided: str
) -> None:
    answer = await http.post(path, **sent(f'{{"guided": {guided}}}'))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert "the body cannot be read (AttributeError: " in error["message"]
    assert "/openapi.json" in error["message"]


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
async def test_a_body_that_is_nested_too_deeply_is_refused(
    http: httpx.AsyncClient, body: str
) -> None:
    for path in ("/invocations", "/v1/completions"):
        answer = await http.post(path, **sent(body))
        assert answer.status_code == 400


async def test_a_refusal_has_the_shape_of_its_route(http: httpx.AsyncClient) -> None:
    for body in ('{"guided": 1}', '{"prompt": "\\ud800"}'):
        answer = await http.post("/v1/messages", **sent(body))
        assert answer.status_code == 400
        assert answer.json()["type"] == "error"


async def test_a_fault_of_the_route_itself_stays_one(http: httpx.AsyncClient) -> None:
    with pytest.raises(AttributeError, match="of the route"):
        await http.post("/v1/completions", **sent('{"prompt": "bug"}'))


async def test_an_answer_that_has_begun_is_not_answered_again(http: httpx.AsyncClient) -> None:
    with pytest.raises(AttributeError):
        await http.post("/stream")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (r'{"prompt": "\ud800"}', "body.prompt"),
        (r'{"prompt": "\uDFFF!"}', "body.prompt"),
        (r'{"prompt": ["a", {"b": "\ud83dx"}]}', "body.prompt[1].b"),
        (r'{"prompt": "\ud83d\ud83d\ude00"}', "body.prompt"),
        (r'{"\udc00": 1}', "a key of body"),
    ],
)
async def test_half_a_surrogate_pair_is_refused_with_its_place(
    http: httpx.AsyncClient, body: str, place: str
) -> None:
    answer = await http.post("/v1/completions", **sent(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{place} has half a surrogate pair")


@pytest.mark.parametrize(
    "body", [r'{"prompt": "\ud83d\ude00"}', r'{"prompt": "\\ud800"}', '{"prompt": "\U0001f600"}']
)
async def test_whole_characters_pass_unchanged(http: httpx.AsyncClient, body: str) -> None:
    answer = await http.post("/v1/completions", **sent(body))
    assert answer.json()["prompt"] == json.loads(body)["prompt"]


@pytest.mark.parametrize("body", [r'{"prompt": "\ud800"', "[" * 5000 + r'"\ud800"', "", "null"])
async def test_what_is_no_json_is_left_to_the_route(http: httpx.AsyncClient, body: str) -> None:
    answer = await http.post("/v1/completions", **sent(body))
    assert answer.status_code in (400, 422)
