"""/v1/residency: what is in every slot, and a stream of what happens to pools and slots.

GET    /v1/residency           which expert is in which slot, and which pools need it
GET    /v1/residency/events    the same and the list of pools, again whenever they change
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from emo_serve.errors import EmoServeError, Unavailable
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.responses import READING, responses
from emo_serve.server.pool_admin.slot_schema import SlotMapAnswer, slot_map_answer
from emo_serve.server.pool_admin.status import PoolStatuses

__all__ = ["create_live_router"]

_EVENTS = "text/event-stream"


def create_live_router(
    statuses: PoolStatuses,
    feed: ResidencyFeed,
    to_http_error: Callable[[EmoServeError], Exception],
) -> APIRouter:
    """Return the routes; `to_http_error` turns our errors into those the app's handlers know."""
    router = APIRouter(prefix="/v1/residency", tags=["pools"])

    @router.get("", responses=responses(*READING))
    async def show_slots() -> SlotMapAnswer:
        """Show which expert is in which slot, and which pools need it there."""
        return slot_map_answer(statuses.slot_map())

    @router.get(
        "/events",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "server-sent events `slots` and `pools`",
                "content": {_EVENTS: {}},
            },
            **responses(*READING, 503),
        },
    )
    async def follow() -> StreamingResponse:
        """Follow what happens to pools and slots, as server-sent events that never end.

        The event `pools` carries what GET /v1/pools answers, `slots` what GET /v1/residency does.
        Both come at once, and again when something has changed: within a second on a server of a
        few pools, and more rarely where a snapshot of them takes longer.
        """
        try:
            feed.check_room()
        except Unavailable as error:
            raise to_http_error(error) from error
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(feed.follow(), media_type=_EVENTS, headers=headers)

    return router
