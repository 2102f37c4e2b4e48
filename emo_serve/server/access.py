"""GET /v1/access: what the key of a request opens, for clients that offer only what will work."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from emo_serve.server.asgi.keys import KeyWord, access_of
from emo_serve.server.pool_admin.responses import READING, responses

__all__ = ["AccessAnswer", "create_access_router"]


class AccessAnswer(BaseModel):
    """What the key that was sent opens."""

    object: Literal["access"] = "access"
    key: KeyWord = Field(description="the key that was sent")
    changes_pools: bool = Field(description="with this key pools may be changed")
    refusal: str | None = Field(description="why they may not; null if they may")


def create_access_router() -> APIRouter:
    """Return the route; it needs the layer `KeyGuard` around it."""
    router = APIRouter(tags=["pools"])

    @router.get("/v1/access", responses=responses(*READING))
    async def show_access(request: Request) -> AccessAnswer:
        """Show whether the key of this request may change pools, and if not, why."""
        access = access_of(request.scope)
        return AccessAnswer(
            key=access.key, changes_pools=access.refusal is None, refusal=access.refusal
        )

    return router
