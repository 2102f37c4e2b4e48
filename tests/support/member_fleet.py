"""Replicas of a fleet in one process, joined without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
from fastapi import FastAPI, HTTPException
from starlette.types import ASGIApp

from emo_serve.cluster.shared import News, Stamp
from emo_serve.errors import EmoServeError
from emo_serve.ray_cluster.fleet_routes import FleetRoutes
from emo_serve.ray_cluster.local_requests import LocalAnswer, LocalRequest
from emo_serve.ray_cluster.member import FleetMember
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.api import create_router
from tests.support.pool_services import ServiceUnderTest, service_of

__all__ = ["Fleet"]


def _to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


class Fleet:
    """Replicas in one process; those in `deaf` hear nothing, those in `running` are asked."""

    def __init__(self) -> None:
        self.members: dict[str, FleetMember] = {}
        self.services: dict[str, ServiceUnderTest] = {}
        self.apps: dict[str, ASGIApp] = {}
        self.running: set[str] = set()
        self.deaf: set[str] = set()

    async def start(self, name: str, service: ServiceUnderTest | None = None) -> None:
        """Start a replica of the pools' routes alone, and let it join."""
        service = service or service_of()
        app = FastAPI()
        app.include_router(create_router(service, _to_http_error))

        @app.get("/metrics")
        async def metrics() -> str:
            return name

        member = FleetMember(name, self)
        await self.join(member, service, FleetRoutes(app, member, self))

    async def join(
        self,
        member: FleetMember,
        service: ServiceUnderTest,
        app: ASGIApp,
        key: str | None = None,
    ) -> None:
        """Let a replica join whose layer is in its app already."""
        self.members[member.name], self.services[member.name] = member, service
        self.apps[member.name] = app
        await member.join(service, app, key)
        self.running.add(member.name)

    # -- what members ask --

    async def ask(
        self, request: LocalRequest, replicas: Sequence[str] | None = None
    ) -> dict[str, LocalAnswer]:
        asked = [one for one in await self.names() if replicas is None or one in replicas]
        return {one: await self.members[one].ask(request) for one in asked}

    async def hear(self, news: Sequence[News]) -> None:
        for name in await self.names():
            if name not in self.deaf:
                await self.members[name].hear(news)

    async def tell(self, stamps: Sequence[Stamp]) -> list[Sequence[News]]:
        return [self.members[name].tell(stamps) for name in await self.names()]

    async def names(self) -> list[str]:
        return sorted(self.running)

    # -- what tests ask --

    def at(self, name: str, **headers: str) -> httpx.AsyncClient:
        """Return a client of one replica."""
        transport = httpx.ASGITransport(self.apps[name])
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    def content(self, pool: str) -> set[str | None]:
        """Return the contents that the running replicas have for a name."""
        found = (self.services[name].lookup.known(pool) for name in self.running)
        return {None if one is None else one.content_hash for one in found}
