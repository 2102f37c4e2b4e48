"""A client that leaves while its pool is waited for, over real HTTP: uvicorn, Starlette, httpx."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from emo_serve.metrics import PoolMetrics
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.vllm_adapter.generation import PooledLLM
from tests.support.fake_engine import FakeEngine
from tests.support.pool_services import ServiceUnderTest, service_of


@pytest.fixture
def no_cycle_collector() -> Any:
    gc.disable()
    yield
    gc.enable()


class Site:
    """A server whose law pool never finishes loading."""

    def __init__(self) -> None:
        self.service: ServiceUnderTest = service_of(FakeEngine(is_holding=True))
        metrics = PoolMetrics(CollectorRegistry(), ["law"], REFUSAL_REASONS)
        self.llm = PooledLLM(None, self.service.residency, metrics)  # type: ignore[arg-type]
        self.background: list[asyncio.Task[None]] = []

    def generate(self) -> Any:
        law = LoRARequest("law", 1, "x")
        return self.llm.generate(tokens_input([7]), SamplingParams(), "id", lora_request=law)

    async def stream(self, request: Request) -> Response:
        streams = [self.generate() for _ in range(2)]

        async def body() -> AsyncIterator[str]:
            try:
                for stream in streams:
                    async for output in stream:
                        yield str(output)
            except ValueError:  # keeps frames and generators in a cycle, as serving layers do
                raise

        made = body()
        streams.append(made)  # a cycle
        return StreamingResponse(made, media_type="text/event-stream")

    async def whole(self, request: Request) -> Response:
        stream = self.generate()
        await request.is_disconnected()
        await asyncio.sleep(0.05)
        raise RuntimeError(stream)  # the traceback keeps the stream

    async def in_background(self, request: Request) -> Response:
        async def read() -> None:
            async for _ in self.generate():
                pass

        self.background.append(asyncio.create_task(read()))
        return Response("queued")

    @property
    def num_waiting(self) -> int:
        return self.service.manager.statistics().waiting_requests

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)

    async def serve(self, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        routes = [
            Route(f"/{name}", getattr(self, name), methods=["POST"])
            for name in ("stream", "whole", "in_background")
        ]
        config = uvicorn.Config(Admission(Starlette(routes=routes)), port=0, log_level="critical")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        await self.until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            await use(client)
        server.should_exit = True
        await serving


async def test_a_stream_that_never_began_is_given_up_with_its_client(
    no_cycle_collector: None,
) -> None:
    site = Site()

    async def use(client: httpx.AsyncClient) -> None:
        asking = [asyncio.create_task(client.post("/stream")) for _ in range(3)]
        await site.until(lambda: site.num_waiting == 6)
        for task in asking:
            task.cancel()
        await site.until(lambda: site.num_waiting == 0)
        assert site.service.manager._backlog.num_admitted == 0

    await site.serve(use)


async def test_a_handler_that_fails_leaves_nothing_waiting(no_cycle_collector: None) -> None:
    site = Site()

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.post("/whole")).status_code == 500
        await site.until(lambda: site.num_waiting == 0)

    await site.serve(use)


async def test_a_background_response_outlives_its_request() -> None:
    site = Site()

    async def use(client: httpx.AsyncClient) -> None:
        assert (await client.post("/in_background")).text == "queued"
        await site.until(lambda: site.num_waiting == 1)
        await asyncio.sleep(0.05)
        assert site.num_waiting == 1
        site.background[0].cancel()
        await site.until(lambda: site.num_waiting == 0)

    await site.serve(use)
