"""GET /v1/pools and GET /v1/pools/{name}: what exists, what is resident, what is running."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from emo_serve.errors import EmoServeError
from emo_serve.server.pool_service import PoolService, PoolStatus

__all__ = ["PoolCard", "PoolDetails", "PoolList", "SlotAccount", "create_router"]


class PoolCard(BaseModel):
    """One pool; bytes are those of its experts, on all devices together."""

    model_config = ConfigDict(frozen=True)

    object: str = "pool"
    name: str
    description: str
    default: bool
    resident: bool
    row: int | None
    running_requests: int
    experts_per_layer: list[int]
    bytes: int
    router_temperature: float
    content_hash: str


class PoolDetails(PoolCard):
    """One pool with its expert ids, an empty list for a dense layer."""

    experts: list[list[int]]


class SlotAccount(BaseModel):
    """The slab's slots, all layers together."""

    model_config = ConfigDict(frozen=True)

    total: int
    used: int
    bytes_per_slot: int


class PoolList(BaseModel):
    """Every pool, the base pool first; files that were refused, with the reason."""

    model_config = ConfigDict(frozen=True)

    object: str = "list"
    data: list[PoolCard]
    refused: list[str]
    slots: SlotAccount


def create_router(
    service: PoolService, to_http_error: Callable[[EmoServeError], Exception]
) -> APIRouter:
    """Return the routes; `to_http_error` turns our errors into those the app's handlers answer."""
    router = APIRouter(prefix="/v1/pools", tags=["pools"])

    @router.get("")
    async def list_pools() -> PoolList:
        stats = service.manager.statistics()
        return PoolList(
            data=[PoolCard.model_validate(_fields(service.status(pool))) for pool in service.pools],
            refused=[str(error) for error in service.catalog.refused],
            slots=SlotAccount(
                total=stats.total_slots, used=stats.used_slots, bytes_per_slot=stats.slot_bytes
            ),
        )

    @router.get("/{name}")
    async def show_pool(name: str) -> PoolDetails:
        try:
            pool = service.find(name)
        except EmoServeError as error:
            raise to_http_error(error) from error
        experts = [list(ids) for ids in pool.expert_ids]
        return PoolDetails.model_validate(_fields(service.status(pool)) | {"experts": experts})

    return router


def _fields(status: PoolStatus) -> dict[str, object]:
    pool = status.pool
    return {
        "name": pool.name,
        "description": pool.description,
        "default": status.is_default,
        "resident": status.is_resident,
        "row": status.row,
        "running_requests": status.running_requests,
        "experts_per_layer": [len(ids) for ids in pool.expert_ids],
        "bytes": status.num_bytes,
        "router_temperature": pool.router_temperature,
        "content_hash": pool.content_hash,
    }
