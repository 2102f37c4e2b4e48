"""/v1/pools: list pools and their state; load, evict and pin them; define and remove them.

    GET    /v1/pools                 every pool, the slab's slots, waiting requests
    POST   /v1/pools                 define the pool in the body, or build one from the examples
                                     in the body; ?replace=true redefines one
    GET    /v1/pools/{name}          one pool, size or union, with its expert ids; ?experts=K shows
                                     it as it would be at another size
    GET    /v1/pools/{name}/cuts     the sizes it can be cut to
    POST   /v1/pools/{name}/cut      define it in another size
    GET    /v1/pools/{name}/document the pool as a file, with its scores
    GET    /v1/pools/{name}/usage    how often tokens chose each of its experts
    DELETE /v1/pools/{name}          remove it and its file
    POST   /v1/pools/{name}/load     make it resident; also evict, pin and unpin
    POST   /v1/pools/evict-all       evict every pool that is not pinned

Bodies are read here and not by FastAPI: their size is limited before they are parsed, they need no
content type, and errors in them name field and value like all our errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel

from emo_serve.errors import EmoServeError, PoolFileError, RequestError, Unavailable
from emo_serve.names import is_derived
from emo_serve.pools.document import (
    BuildRequest,
    PoolDocument,
    format_pool,
    is_build,
    parse_build,
    parse_pool,
)
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.strict_json import parse_json
from emo_serve.pools.strict_model import validated
from emo_serve.server.pool_admin.build_schema import BuiltPool, built_of
from emo_serve.server.pool_admin.cuts import CutList, CutRequest
from emo_serve.server.pool_admin.responses import CHANGING, READING, responses
from emo_serve.server.pool_admin.schema import (
    DeletedPool,
    EvictOptions,
    ListOptions,
    LoadOptions,
    NoOptions,
    PoolCard,
    PoolDetails,
    PoolList,
    ReplaceOptions,
    ShowOptions,
    UsageAnswer,
    body_schema,
    card_of,
    details_of,
    list_of,
    usage_answer,
)
from emo_serve.server.pool_admin.service import PoolService

if TYPE_CHECKING:
    from emo_serve.server.pool_admin.builder import PoolBuilder

__all__ = ["MAX_DOCUMENT_BYTES", "create_router"]

MAX_DOCUMENT_BYTES = 8 * 2**20
"""A pool of 64 layers of 1024 experts with scores takes 1.7 MB, or 2.7 MB indented.

The same limit holds for examples: some two million tokens.
"""

_MAX_OPTIONS_BYTES = 64 * 2**10

_Options = TypeVar("_Options", bound=BaseModel)


def create_router(
    service: PoolService,
    to_http_error: Callable[[EmoServeError], Exception],
    builder: PoolBuilder | None = None,
) -> APIRouter:
    """Return the routes; `to_http_error` turns our errors into those the app's handlers know.

    Without a `builder`, requests to build a pool from examples are refused.
    """
    router = APIRouter(prefix="/v1/pools", tags=["pools"])
    _add_reading(router, service, to_http_error)
    _add_definitions(router, service, to_http_error, builder)
    _add_residency(router, service, to_http_error)
    return router


def _add_reading(
    router: APIRouter, service: PoolService, to_http_error: Callable[[EmoServeError], Exception]
) -> None:
    @router.get("", response_model_exclude_unset=True, responses=responses(*READING))
    async def list_pools(options: Annotated[ListOptions, Query()]) -> PoolList:
        """List all pools, the slab's slots, and the pool files that were refused."""
        return list_of(service.statuses.overview(), experts=options.experts)

    @router.get("/{name}", responses=responses(*READING, 404))
    async def show_pool(name: str, options: Annotated[ShowOptions, Query()]) -> PoolDetails:
        """Show one pool, size or union with its expert ids.

        With `experts`, show what each of its pools would be at that size: how many bytes its
        experts take, and how many are missing from the slots.
        """
        with _answering(to_http_error):
            status = service.statuses.of(service.lookup.find(name, experts=options.experts))
            return details_of(service.statuses.overview(), status)

    @router.get(
        "/{name}/document",
        response_class=Response,
        responses={
            200: {"description": "the pool as its file has it", "model": PoolDocument},
            **responses(*READING, 404),
        },
    )
    async def show_document(name: str) -> Response:
        """Return a pool as a document, with its scores, to be kept or defined elsewhere."""
        with _answering(to_http_error):
            pool = service.lookup.find(name)
            if is_derived(pool.name):
                raise RequestError(
                    f"{pool.name!r} is made of pools and has no document; ask for each of its pools"
                )
            return Response(format_pool(pool), media_type="application/json")

    @router.get("/{name}/usage", responses=responses(*READING, 404, 500, 503))
    async def show_usage(name: str) -> UsageAnswer:
        """Show how often tokens chose each expert of a pool since the engine started."""
        with _answering(to_http_error):
            return usage_answer(*await service.statuses.usage(name))


def _add_definitions(
    router: APIRouter,
    service: PoolService,
    to_http_error: Callable[[EmoServeError], Exception],
    builder: PoolBuilder | None,
) -> None:
    @router.post(
        "",
        response_model_exclude_unset=True,
        status_code=HTTPStatus.CREATED,
        responses={
            200: {"description": "redefined", "model": BuiltPool | PoolCard},
            **responses(*CHANGING),
        },
        openapi_extra=body_schema(PoolDocument, BuildRequest, required=True),
    )
    async def define_pool(
        request: Request, response: Response, options: Annotated[ReplaceOptions, Query()]
    ) -> BuiltPool | PoolCard:
        """Define or redefine a pool; running requests finish with the old experts.

        The body is a pool, or examples of its domain. From examples the pool is built first, while
        other requests are served, and the answer comes when the pool is defined.
        """
        card: BuiltPool | PoolCard
        with _answering(to_http_error):
            body = await _read_body(request, MAX_DOCUMENT_BYTES)
            wanted = await asyncio.to_thread(_parse_definition, body)
            if isinstance(wanted, ExpertPool):
                status, is_new = await service.definitions.add(wanted, replace=options.replace)
                card = card_of(status)
            elif builder is not None:
                build = await builder.build(wanted, replace=options.replace)
                card, is_new = built_of(build), build.is_new
            else:
                raise Unavailable("this server does not build pools; use emo-serve pools build")
        response.status_code = HTTPStatus.CREATED if is_new else HTTPStatus.OK
        return card

    @router.get("/{name}/cuts", responses=responses(*READING, 404))
    async def show_cuts(name: str) -> CutList:
        """Show the sizes that a pool with scores can be cut to, and what each keeps and takes."""
        with _answering(to_http_error):
            pool = service.lookup.find(name)
            cuts = await asyncio.to_thread(service.definitions.cuts_of, pool)
            return CutList(name=pool.name, data=cuts)

    @router.post(
        "/{name}/cut",
        response_model_exclude_unset=True,
        status_code=HTTPStatus.CREATED,
        responses=responses(*CHANGING, 404),
        openapi_extra=body_schema(CutRequest, required=True),
    )
    async def cut_pool(name: str, request: Request) -> PoolCard:
        """Define a pool that keeps the best-scored experts of another one."""
        with _answering(to_http_error):
            wanted = await _read_options(request, CutRequest)
            return card_of(await service.definitions.cut(name, wanted))

    @router.delete("/{name}", responses=responses(*CHANGING, 404))
    async def remove_pool(name: str) -> DeletedPool:
        """Remove a pool and its file; running requests in it finish."""
        with _answering(to_http_error):
            await service.definitions.remove(name)
        return DeletedPool(id=name, name=name)


def _add_residency(
    router: APIRouter, service: PoolService, to_http_error: Callable[[EmoServeError], Exception]
) -> None:
    def action(
        verb: str, options: type[BaseModel]
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return router.post(
            f"/{{name}}/{verb}",
            response_model_exclude_unset=True,
            responses=responses(*CHANGING, 404),
            openapi_extra=body_schema(options),
        )

    @action("load", LoadOptions)
    async def load_pool(name: str, request: Request) -> PoolCard:
        """Make a pool, size or union resident; waits in the same queue as requests."""
        with _answering(to_http_error):
            options = await _read_options(request, LoadOptions)
            return card_of(await service.residency.load(name, pin=options.pin))

    @action("evict", EvictOptions)
    async def evict_pool(name: str, request: Request) -> PoolCard:
        """Evict a pool: free the slots that no other resident pool needs."""
        with _answering(to_http_error):
            options = await _read_options(request, EvictOptions)
            return card_of(await service.residency.evict(name, drain=options.drain))

    @router.post(
        "/evict-all",
        response_model_exclude_unset=True,
        responses=responses(*CHANGING),
        openapi_extra=body_schema(EvictOptions),
    )
    async def evict_all_pools(request: Request) -> PoolList:
        """Evict every pool that is not pinned: free the slots that no pinned pool needs.

        Later requests load their pools again. If a pool may not be evicted, none is.
        """
        with _answering(to_http_error):
            options = await _read_options(request, EvictOptions)
            await service.residency.evict_all(drain=options.drain)
            return list_of(service.statuses.overview(), experts=False)

    @action("pin", NoOptions)
    async def pin_pool(name: str, request: Request) -> PoolCard:
        """Make a pool, size or union resident, and keep it resident until it is unpinned."""
        with _answering(to_http_error):
            await _read_options(request, NoOptions)
            return card_of(await service.residency.load(name, pin=True))

    @action("unpin", NoOptions)
    async def unpin_pool(name: str, request: Request) -> PoolCard:
        """Allow a pool to be evicted again."""
        with _answering(to_http_error):
            await _read_options(request, NoOptions)
            return card_of(service.residency.unpin(name))


@contextmanager
def _answering(to_http_error: Callable[[EmoServeError], Exception]) -> Iterator[None]:
    try:
        yield
    except EmoServeError as error:
        raise to_http_error(error) from error


# -- bodies --


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body; raises HTTPException with 413 once it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {limit} bytes",
                headers={"connection": "close"},
            )
    return bytes(body)


def _parse_definition(body: bytes) -> ExpertPool | BuildRequest:
    try:
        document = parse_json("body", body)
        return parse_build(document) if is_build(document) else parse_pool("body", document)
    except PoolFileError as error:
        raise RequestError(str(error)) from error


async def _read_options(request: Request, model: type[_Options]) -> _Options:
    body = await _read_body(request, _MAX_OPTIONS_BYTES)
    if not body.strip() and not any(field.is_required() for field in model.model_fields.values()):
        return model()
    try:
        return validated(model, "body", parse_json("body", body), "the body")
    except PoolFileError as error:
        raise RequestError(str(error)) from error
