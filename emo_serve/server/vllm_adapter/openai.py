"""vLLM's serving layer around our engine client: the app and the HTTP server.

The OpenAI protocol is vLLM's own: `build_app` and `init_app_state` around an engine client. These
things are replaced, each named in tests/unit/server/vllm_adapter/test_contract.py.

- `generate` of the engine client, in `generation`.
- `OpenAIServingModels.lora_requests`. vLLM looks up model names in it. Ours contains every pool and
  union, and passes the name that the client sent to `generate` in a LoRARequest, which goes no
  further. Iterating over it gives nothing, because vLLM also searches it for names of message
  types.
- `OpenAIServingModels.show_available_models`, which lists pools beside the model.
- How the renderer tokenizes, in `tokenization`.
- `GET /metrics`, in `metrics_routes`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server, watchdog_loop
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest

from emo_serve.errors import ConfigError, EmoServeError
from emo_serve.metrics import PoolMetrics
from emo_serve.names import AUTO_POOL
from emo_serve.server.asgi.context import current_request
from emo_serve.server.asgi.errors import reason_of
from emo_serve.server.asgi.protocol import BoundedHttpProtocol
from emo_serve.server.pool_admin.lookup import PoolLookup
from emo_serve.server.vllm_adapter.flags import with_values
from emo_serve.server.vllm_adapter.generation import PooledLLM, to_http_error
from emo_serve.server.vllm_adapter.refusal_log import log_refusals_in_one_line
from emo_serve.server.vllm_adapter.tokenization import BoundedTokenization

__all__ = [
    "bind_socket",
    "build_http_app",
    "create_http_server",
    "innermost",
    "replace_innermost",
    "run_beside_server",
]

# -- app --


class _PoolNames(Mapping[str, LoRARequest]):
    """Where vLLM looks up adapters by model name: contains every pool, but lists none."""

    def __init__(self, lookup: PoolLookup, metrics: PoolMetrics) -> None:
        self._lookup = lookup
        self._metrics = metrics

    def __contains__(self, model: object) -> bool:
        """Tell whether this is a pool's name, not the model's; raise for a name that is neither."""
        if not isinstance(model, str) or not model or model in self._lookup.names.base:
            return False
        try:
            self._lookup.find(model, current_request().pool_headers)
        except EmoServeError as error:
            self._metrics.count_refusal(reason_of(error))
            raise to_http_error(error) from error
        return True

    def __getitem__(self, model: str) -> LoRARequest:
        return LoRARequest(lora_name=model, lora_int_id=1, lora_path="emo-serve:pool")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


async def _list_models(registry: Any, lookup: PoolLookup) -> ModelList:
    listed: ModelList = await registry.show_available_models()
    base = lookup.names.base[0]
    for card in listed.data:
        card.default_pool = lookup.names.default_pool
    for name in (AUTO_POOL, *(pool.name for pool in lookup.named)):
        listed.data.append(
            ModelCard(
                id=name,
                root=f"{base}:{name}",
                parent=base,
                owned_by="emo-serve",
                max_model_len=listed.data[0].max_model_len,
                permission=[ModelPermission()],
            )
        )
    return listed


async def build_http_app(
    llm: PooledLLM,
    args: argparse.Namespace,
    lookup: PoolLookup,
    metrics: PoolMetrics,
    max_prompts: int | None = None,
) -> FastAPI:
    """Build vLLM's app around the engine client, with the pools' names as models.

    `max_prompts` is the number of prompts that one request may have; None is no limit. vLLM's check
    of keys is left out, for ours.
    """
    tasks = await llm.get_supported_tasks()
    args = with_values(args, api_key=[""])  # without any, vLLM reads VLLM_API_KEY
    app: FastAPI = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    scoring = getattr(app.state, "serving_generative_scoring", None)
    BoundedTokenization(llm.renderer, max_prompts).install(scoring)
    log_refusals_in_one_line()
    models = app.state.openai_serving_models
    models.lora_requests = _PoolNames(lookup, metrics)
    models.show_available_models = partial(_list_models, models.registry, lookup)
    return app


def innermost(app: FastAPI) -> ASGIApp:
    """Return what vLLM's middleware passes requests to: the router of all routes."""
    inner: ASGIApp = app.router.middleware_stack
    return inner


def replace_innermost(app: FastAPI, layers: ASGIApp) -> None:
    """Put ASGI layers around what `innermost` returned, inside vLLM's middleware."""
    app.router.middleware_stack = layers  # type: ignore[assignment]


# -- HTTP server --


def bind_socket(args: argparse.Namespace) -> socket.socket:
    """Bind the port before the engine starts, as vLLM does, without answering requests yet.

    A Unix socket that a dead server left is replaced. Raises ConfigError if it cannot be bound.
    """
    try:
        if args.uds:
            _remove_dead_socket(args.uds)
        _, sock = setup_server(args, reuse_port=False)
    except OSError as error:
        where = args.uds or f"{args.host or ''}:{args.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error
    return sock  # type: ignore[no-any-return]


def _remove_dead_socket(path: str) -> None:
    """Remove a Unix socket that no process has bound any more; leave any other file alone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        # A server that is starting has bound its socket but does not listen yet.
        with suppress(OSError):
            if any(line.endswith(f" {path}") for line in _bound_sockets()):
                return
        os.unlink(path)
    except OSError:  # there is none, it is busy, or it is not ours to reach: bind says so
        return


def _bound_sockets() -> list[str]:
    with open("/proc/net/unix") as table:
        return table.read().splitlines()[1:]


def create_http_server(app: FastAPI, args: argparse.Namespace) -> uvicorn.Server:
    """Create uvicorn's server for the app, with vLLM's flags; signals are left to the caller."""
    options: dict[str, Any] = {
        "host": args.host,
        "port": args.port,
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "timeout_graceful_shutdown": 1,  # requests still running have had the whole drain time
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "h11_max_incomplete_event_size": args.h11_max_incomplete_event_size,
        "http": BoundedHttpProtocol,
    }
    if args.ssl_ciphers:
        options["ssl_ciphers"] = args.ssl_ciphers
    if (log_config := get_uvicorn_log_config(args)) is not None:
        options["log_config"] = log_config
    config = uvicorn.Config(app, **options)
    config.h11_max_header_count = args.h11_max_header_count  # type: ignore[attr-defined]
    config.load()
    server: uvicorn.Server = NoSignalServer(config)
    app.state.server = server  # vLLM's error handler stops it if the engine dies
    return server


def run_beside_server(
    server: uvicorn.Server, llm: PooledLLM, args: argparse.Namespace
) -> list[asyncio.Task[None]]:
    """Start the tasks that vLLM runs beside its server: watchdog and certificate refresh."""
    tasks = [asyncio.create_task(watchdog_loop(server, llm))]
    if args.enable_ssl_refresh:
        refresher = SSLCertRefresher(
            ssl_context=server.config.ssl,
            key_path=args.ssl_keyfile,
            cert_path=args.ssl_certfile,
            ca_path=args.ssl_ca_certs,
        )
        tasks[0].add_done_callback(lambda _: refresher.stop())
    return tasks
