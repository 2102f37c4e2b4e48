"""Our routes beside vLLM's: in its app, and in /openapi.json, where they change nothing of vLLM's.

FastAPI names the components of a document over all routes together, so that a route more can rename
those of others, and with them the classes of generated clients. Our part of the document is made on
its own and joined to vLLM's.
"""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emo_serve.server.asgi.errors import error_response

__all__ = ["add_routes", "document_of"]

_Document = dict[str, Any]

_NEVER_ANSWERED = "422"  # FastAPI documents it; vLLM's handlers turn it into a 400
_ITS_COMPONENTS = ("HTTPValidationError", "ValidationError")


def add_routes(app: FastAPI, router: APIRouter) -> None:
    """Add routes to an app and to its OpenAPI document.

    OPTIONS on their paths is answered with all methods of the path, and so is a method that a path
    does not have, with 405.
    """
    app.include_router(router, include_in_schema=False)
    methods: dict[str, set[str]] = {}
    for route in router.routes:
        if isinstance(route, APIRoute):
            methods.setdefault(route.path, set()).update(route.methods)
    app.router.routes += [
        Route(path, _OtherMethods(allowed), include_in_schema=False)
        for path, allowed in methods.items()
    ]
    theirs = app.openapi
    joined: _Document = {}

    def openapi() -> _Document:
        if not joined:
            joined.update(_joined(theirs(), document_of(router)))
        return joined

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def document_of(router: APIRouter) -> _Document:
    """Return the OpenAPI document of our routes alone."""
    document = get_openapi(title="emo-serve", version="1", routes=router.routes)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop(_NEVER_ANSWERED, None)
    for name in _ITS_COMPONENTS:
        _schemas(document).pop(name, None)
    return document


def _joined(theirs: _Document, ours: _Document) -> _Document:
    """Return a document with the paths and components of both, and all else of the first."""
    paths, schemas = (theirs["paths"], ours["paths"]), (_schemas(theirs), _schemas(ours))
    assert not paths[0].keys() & paths[1].keys()
    assert not schemas[0].keys() & schemas[1].keys()
    components = {**theirs.get("components", {}), "schemas": schemas[0] | schemas[1]}
    return {**theirs, "paths": paths[0] | paths[1], "components": components}


def _schemas(document: _Document) -> _Document:
    schemas: _Document = document.get("components", {}).get("schemas", {})
    return schemas


class _OtherMethods:
    """Answer the methods that the routes of a path before this one do not have.

    Starlette alone would name only those of the first such route.
    """

    def __init__(self, methods: Collection[str]) -> None:
        self._allow = {"allow": ", ".join(sorted({*methods, "OPTIONS"}))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 204, or with 405, and the methods that there are."""
        status = HTTPStatus.METHOD_NOT_ALLOWED
        message = f"method is {scope['method']}; expected one of {self._allow['allow']}"
        response: Response = error_response(scope, status, message, self._allow)
        if scope["method"] == "OPTIONS":
            response = Response(status_code=HTTPStatus.NO_CONTENT, headers=self._allow)
        await response(scope, receive, send)
