"""Our routes beside vLLM's: its part of /openapi.json is unchanged, ours tells every answer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from emo_serve.errors import EmoServeError
from emo_serve.server.access import create_access_router
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.console.routes import create_console_router
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.live import create_live_router
from emo_serve.server.pool_admin.responses import READY_RESPONSES
from emo_serve.server.routes import add_routes, document_of
from tests.support.pool_services import service_of

ALLOWED = {
    "/v1/pools": "GET, OPTIONS, POST",
    "/v1/pools/math": "DELETE, GET, OPTIONS",
    "/v1/pools/math/usage": "GET, OPTIONS",
    "/v1/pools/math/load": "OPTIONS, POST",
    "/v1/residency": "GET, OPTIONS",
    "/v1/access": "GET, OPTIONS",
    "/console": "GET, OPTIONS",
    "/ready": "GET, OPTIONS",
}


def to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


def our_router() -> APIRouter:
    """Return the routes as the server has them."""
    router = APIRouter()

    @router.get("/ready", responses=READY_RESPONSES)
    async def ready() -> dict[str, bool]:
        """Tell whether the server is ready."""
        return {"ready": True}

    service = service_of()
    router.include_router(create_router(service, to_http_error))
    feed = ResidencyFeed(service.statuses)
    router.include_router(create_live_router(service.statuses, feed, to_http_error))
    router.include_router(create_access_router())
    router.include_router(create_console_router())
    return router


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def test_vllms_part_of_the_document_is_unchanged() -> None:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    plain, served = (build_app(args, ("generate",), cast(Any, None)) for _ in range(2))
    add_routes(served, our_router())
    theirs, joined, ours = plain.openapi(), served.openapi(), document_of(our_router())
    for part, whole, own in (
        (theirs["paths"], joined["paths"], ours["paths"]),
        *[tuple(one["components"]["schemas"] for one in (theirs, joined, ours))],
    ):
        assert list(whole) == [*part, *own], "vLLM's first, in its order, and no name is used twice"
        assert {name: whole[name] for name in part} == part
    assert {key: joined[key] for key in theirs.keys() - {"paths", "components"}} == {
        key: theirs[key] for key in theirs.keys() - {"paths", "components"}
    }
    assert served.openapi() is joined


def test_a_server_imports_vllms_protocol_as_vllm_does() -> None:
    """In another order, vLLM's ComparisonFilter has another name: see the reason in `serve`."""
    program = "import sys, emo_serve.server.serve; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    order = found.stdout.splitlines()[-1].split()
    assert order.index("vllm.entrypoints.openai.responses.protocol") < order.index(
        "emo_serve.metrics"
    )


def test_a_model_of_the_same_name_does_not_rename_vllms() -> None:
    def model(**fields: Any) -> type[BaseModel]:
        return type("Card", (BaseModel,), {"__annotations__": fields})

    def router_of(path: str, card: type[BaseModel]) -> APIRouter:
        router = APIRouter()
        router.add_api_route(path, lambda: None, response_model=card)
        return router

    app = FastAPI()
    app.include_router(router_of("/theirs", model(theirs=int)))
    add_routes(app, router_of("/ours", model(ours=str)))
    with pytest.raises(AssertionError):  # found in development, not by clients
        app.openapi()


def test_every_status_of_ours_is_documented_with_its_shape() -> None:
    document = document_of(our_router())
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    error = {"$ref": "#/components/schemas/ErrorAnswer"}
    statuses: dict[str, set[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses[f"{method} {path}"] = set(operation["responses"])
            for status, response in operation["responses"].items():
                if "text/event-stream" in response["content"]:
                    continue
                schema = response["content"]["application/json"]["schema"]
                is_error = status >= "400" and (path, status) != ("/ready", "503")
                assert (schema == error) is is_error, (method, path, status)
    changing = {"200", "400", "401", "403", "404", "408", "409", "413", "500", "503"}
    assert statuses == {
        "get /ready": {"200", "401", "503"},
        "get /v1/pools": {"200", "400", "401"},
        "post /v1/pools": changing - {"404"} | {"201"},
        "get /v1/pools/{name}": {"200", "400", "401", "404"},
        "delete /v1/pools/{name}": changing,
        "get /v1/pools/{name}/cuts": {"200", "400", "401", "404"},
        "post /v1/pools/{name}/cut": changing - {"200"} | {"201"},
        "get /v1/pools/{name}/document": {"200", "400", "401", "404"},
        "get /v1/residency": {"200", "400", "401"},
        "get /v1/residency/events": {"200", "400", "401", "503"},
        "get /v1/access": {"200", "400", "401"},
        "get /v1/pools/{name}/usage": {"200", "400", "401", "404", "500", "503"},
        **{f"post /v1/pools/{{name}}/{verb}": changing for verb in ("load", "evict")},
        **{f"post /v1/pools/{{name}}/{verb}": changing for verb in ("pin", "unpin")},
        "post /v1/pools/evict-all": changing - {"404"},
    }


@pytest.mark.parametrize(("path", "allowed"), ALLOWED.items())
async def test_options_and_refused_methods_name_all_methods(path: str, allowed: str) -> None:
    app = FastAPI()
    add_routes(app, our_router())
    async with client_of(app) as client:
        asked = await client.options(path)
        assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
        for method in ("PUT", "PATCH", "HEAD"):
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        error = (await client.put(path)).json()["error"]
        assert error["message"] == f"method is PUT; expected one of {allowed}"
        assert (error["type"], error["code"], error["param"]) == ("Method Not Allowed", 405, None)
        assert (await client.get("/v1/pools")).status_code == 200


async def test_a_pool_that_no_request_could_use_is_a_400_that_is_documented() -> None:
    app = FastAPI()
    add_routes(app, our_router())
    async with client_of(app) as client:
        for name in ("hot+math", "auto"):  # two temperatures; no pool
            assert (await client.get(f"/v1/pools/{name}")).status_code == 400


def test_the_schema_of_a_build_refuses_what_the_route_refuses() -> None:
    document = document_of(our_router())
    body = document["paths"]["/v1/pools"]["post"]["requestBody"]["content"]["application/json"]
    build = body["schema"]["anyOf"][1]
    text, written, _ = build["properties"]["examples"]["items"]["anyOf"]
    for schema in (text, written["properties"]["text"]):
        assert (schema["type"], schema["minLength"], schema["pattern"]) == ("string", 1, r"\S")
