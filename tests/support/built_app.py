"""vLLM's own app with all its routes and our layers, around a scripted engine: no engine starts."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.registry import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.input_processor import InputProcessor

from emo_serve.config import ServeSettings
from emo_serve.errors import EmoServeError
from emo_serve.metrics import PoolMetrics
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.access import create_access_router
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.asgi.keys import KeyGuard
from emo_serve.server.auto.prompt_text import Prompt
from emo_serve.server.console.routes import CONSOLE_PATHS, create_console_router
from emo_serve.server.coverage import CoverageSum
from emo_serve.server.layers import Around, put_layers, unchanged
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.live import create_live_router
from emo_serve.server.routes import add_routes
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.flags import (
    engine_args,
    parse_serve_args,
    with_engine_values,
    with_values,
)
from emo_serve.server.vllm_adapter.generation import PooledLLM, to_http_error
from emo_serve.server.vllm_adapter.openai import build_http_app
from tests.support.pool_services import POOLS, ServiceUnderTest, service_of

API, ADMIN = "Clients1", "Operators1"
ORIGIN = "http://browser.example"
MAX_BODY = 4096


@cache
def serve_args(checkpoint: Path, *flags: str) -> argparse.Namespace:
    """Return the flags of a server of the model `emo`, as the launch completes them."""
    args = parse_serve_args(
        [str(checkpoint), "--served-model-name", "emo", "--enforce-eager", *flags], {}
    )
    args = with_values(args, model=str(checkpoint), model_tag=str(checkpoint))
    return with_engine_values(args, ServeSettings.from_args(args), 8)


@cache
def engine_config(checkpoint: Path) -> Any:
    """Return vLLM's configuration of an engine for this checkpoint."""
    args = engine_args(serve_args(checkpoint))
    return args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


class ScriptedEngine:
    """What vLLM's serving layer asks of its engine client; `generate` says "ab" in two outputs.

    It begins only while `may_begin` is set, and gives its last output only while `may_finish` is.
    """

    errored = False

    def __init__(self, config: Any) -> None:
        self.vllm_config, self.model_config = config, config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.may_begin, self.may_finish = asyncio.Event(), asyncio.Event()
        self.may_begin.set()
        self.may_finish.set()
        self.failure: Exception | None = None
        self.running: list[str] = []

    @property
    def num_running(self) -> int:
        return len(self.running)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Admit everything."""

    async def is_tracing_enabled(self) -> bool:
        return False

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        self.running.append(request_id)
        try:
            await self.may_begin.wait()
            await self.add_request(prompt, params, request_id, **options)
            for place, text in enumerate("ab"):
                if text == "b":
                    await self.may_finish.wait()
                if self.failure is not None:
                    raise self.failure
                reason = "length" if text == "b" else None
                part = CompletionOutput(0, text, [97 + place], None, None, finish_reason=reason)
                yield RequestOutput(request_id, None, [7, 8], None, [part], reason is not None)
        finally:
            self.running.remove(request_id)

    async def add_request(self, *_: Any, **__: Any) -> None:
        """Take every request."""


class ScriptedChooser:
    """A chooser for `auto` that takes math, or refuses with `failure`."""

    failure: EmoServeError | None = None

    async def choose(self, prompt: Prompt) -> ExpertPool:
        if self.failure is not None:
            raise self.failure
        return POOLS[0]

    def add_examples(self, name: str, texts: Sequence[str]) -> None:
        raise AssertionError("a request teaches nothing")

    def remove(self, name: str) -> None:
        raise AssertionError("a request removes nothing")


class BuiltApp:
    """The app of a server with pools math, code, law and hot, all layers in place."""

    def __init__(
        self,
        app: FastAPI,
        args: argparse.Namespace,
        engine: ScriptedEngine,
        service: ServiceUnderTest,
        llm: PooledLLM,
        metrics: PoolMetrics,
        keys: Sequence[Sequence[str]],
        around: Around,
    ) -> None:
        self.app, self.engine, self.service, self.llm = app, engine, service, llm
        self.chooser = ScriptedChooser()
        self.root = args.root_path or ""
        guard = partial(
            KeyGuard,
            api_keys=keys[0],
            admin_keys=keys[1],
            open_paths=("/health", *CONSOLE_PATHS),
            is_local=True,
        )
        names = service.lookup.names
        self.admission = put_layers(app, guard, names, self.chooser, metrics, MAX_BODY, around)
        self.is_ending = False
        as_http_error = partial(to_http_error, param=None)
        self.feed = ResidencyFeed(service.statuses, lambda: self.is_ending)
        router = APIRouter()
        router.include_router(create_router(service, as_http_error, None))
        router.include_router(create_live_router(service.statuses, self.feed, as_http_error))
        router.include_router(create_access_router())
        router.include_router(create_console_router())
        add_routes(app, router)

    @classmethod
    async def of(
        cls,
        checkpoint: Path,
        *flags: str,
        service: ServiceUnderTest | None = None,
        keys: Sequence[Sequence[str]] = ((), ()),
        around: Around = unchanged,
    ) -> BuiltApp:
        """Build the app; `keys` are the clients' and the operators'."""
        args, config = serve_args(checkpoint, *flags), engine_config(checkpoint)
        engine = ScriptedEngine(config)
        service = service or service_of()
        names = [pool.name for pool in service.lookup.pools]
        metrics = PoolMetrics(CollectorRegistry(), names, REFUSAL_REASONS)

        async def read() -> dict[int, CoverageSum]:
            return {number: CoverageSum(3.0, 4) for number in range(1, 100)}

        coverage = CoverageBook(read, lambda pool, share: None)
        llm = PooledLLM(engine, service.residency, metrics, coverage)  # type: ignore[arg-type]
        app = await build_http_app(llm, args, service.lookup, metrics)
        return cls(app, args, engine, service, llm, metrics, keys, around)

    def client(self, **headers: str) -> httpx.AsyncClient:
        """Return a client of the app; what the app raises, the client raises."""
        url = f"http://test{self.root}"
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url=url, headers=headers
        )
