"""The adapter to vLLM's serving layer; a vLLM upgrade breaks this, `vllm_engine` or nothing.

The OpenAI protocol is vLLM's own: `build_app` and `init_app_state` around an engine client. Three
things are replaced, each named in tests/unit/server/vllm_adapter/test_contract.py.

- `AsyncLLM.generate`, in `vllm_engine`.
- `OpenAIServingModels.lora_requests`. vLLM asks it whether it knows a model name; ours answers for
  every pool and union, and carries the name the client wrote to `generate` as a LoRARequest, which
  goes no further. It lists nothing: vLLM also searches it for names of message types.
- `OpenAIServingModels.show_available_models`, which lists pools beside the model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server, watchdog_loop
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.prometheus import get_prometheus_registry

from emo_serve.config import AUTO_POOL, ServeSettings, add_serve_flags
from emo_serve.errors import ConfigError, EmoServeError, EngineDead
from emo_serve.metrics import PoolMetrics
from emo_serve.server.asgi.admission import AsgiApp, current_request
from emo_serve.server.asgi.errors import reason_of
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.request_log import RequestLog
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.engine import PooledLLM, to_http_error
from emo_serve.vllm_plugin import (
    ADDITIONAL_CONFIG_KEY,
    LOAD_FORMAT,
    WORKER_EXTENSION_CLS,
    check_expert_dtype,
    check_moe_backend,
    worker_cls_for,
)

__all__ = [
    "bind_socket",
    "build_http_app",
    "create_http_server",
    "dtype_bytes",
    "metrics_registry",
    "parse_serve_args",
    "run_beside_server",
    "start_engine",
]

_RECORD_VARIABLE = "EMO_SERVE_RECORD_ROUTING"  # for benchmarks: 0 shows what recording costs

# -- command line --


def parse_serve_args(
    argv: Sequence[str], defaults_without_model: Mapping[str, object]
) -> argparse.Namespace:
    """Parse the flags of `vllm serve` and ours; vLLM's quick checks raise ConfigError here.

    A positional MODEL and `--model` mean the same; the result has it in `model_tag`. With neither,
    `defaults_without_model` takes the place of vLLM's defaults, by the names in the namespace.
    """
    cli_env_setup()
    # Workers wait this long before they are told to end; a drained server has nothing to wait for.
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
    parser = FlexibleArgumentParser(prog="emo-serve serve", conflict_handler="resolve")
    make_arg_parser(parser)
    default_model = parser.get_default("model")
    add_serve_flags(parser)
    args: argparse.Namespace = parser.parse_args(list(argv))
    if args.model_tag is None and args.model != default_model:
        args.model_tag = args.model
    if args.model_tag is None:
        parser.set_defaults(**defaults_without_model)
        args = parser.parse_args(list(argv))
    args.moe_backend = "auto"  # vLLM's flag of this name gave way to ours
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return args


def bind_socket(args: argparse.Namespace) -> socket.socket:
    """Take the port before the engine starts, as vLLM does; nobody is answered yet."""
    try:
        _, sock = setup_server(args, reuse_port=False)
    except OSError as error:
        where = args.uds or f"{args.host or ''}:{args.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    except (KeyError, ValueError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error
    return sock  # type: ignore[no-any-return]


# -- engine --


def dtype_bytes(args: argparse.Namespace) -> int:
    """Return the bytes of one activation in the dtype vLLM resolves these flags to."""
    return int(_resolved(lambda: _engine_args(args).create_model_config()).dtype.itemsize)


def start_engine(args: argparse.Namespace, settings: ServeSettings, num_slots: int) -> PooledLLM:
    """Start vLLM's engine with empty expert slots; `args.model` is a local directory."""
    check_expert_dtype(settings.expert_dtype, settings.moe_backend, current_platform.device_type)
    check_moe_backend(settings.moe_backend, current_platform.device_type)
    args.load_format = LOAD_FORMAT
    args.worker_cls = worker_cls_for(current_platform.device_type)
    args.worker_extension_cls = WORKER_EXTENSION_CLS
    ours = {
        "num_slots": num_slots,
        "num_pools": settings.max_pools,
        "host_expert_bytes": settings.host_expert_bytes,
        "records_routing": os.environ.get(_RECORD_VARIABLE) != "0",
        "moe_backend": settings.moe_backend,
        "expert_dtype": settings.expert_dtype,
    }
    args.additional_config = {**(args.additional_config or {}), ADDITIONAL_CONFIG_KEY: ours}
    if args.enforce_eager and current_platform.is_cpu():
        # Eager leaves vLLM's small compiled helpers, of log-probabilities for one: on a CPU they
        # need a C++ compiler and 14 s at first use.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    engine_args, usage = _engine_args(args), UsageContext.OPENAI_API_SERVER
    engine_args.scheduling_policy = "priority"  # pools are built behind everybody's requests
    config = _resolved(lambda: engine_args.create_engine_config(usage_context=usage))
    try:
        return PooledLLM.from_vllm_config(  # type: ignore[no-any-return]
            vllm_config=config,
            usage_context=usage,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )
    except RuntimeError as error:  # its processes have logged why
        raise EngineDead(
            "vLLM's engine did not start; the first ERROR above says why (on a CPU often memory:"
            " see --kv-cache-memory-bytes)"
        ) from error


def _engine_args(args: argparse.Namespace) -> Any:
    return _resolved(lambda: AsyncEngineArgs.from_cli_args(args))


def _resolved(build: Any) -> Any:
    """Build a config of vLLM's; what it refuses becomes one line of ConfigError."""
    try:
        return build()
    except EmoServeError:
        raise
    except (KeyError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses these flags: {' '.join(str(error).split())}") from error


# -- app --


class _PoolNames(Mapping[str, LoRARequest]):
    """Stand where vLLM looks up adapters by model name: every pool is known, none is listed."""

    def __init__(self, service: PoolService, metrics: PoolMetrics) -> None:
        self._service = service
        self._metrics = metrics

    def __contains__(self, model: object) -> bool:
        """Tell a pool's name from the base model's; raise for a name that is neither."""
        if not isinstance(model, str) or not model or model in self._service.names.base:
            return False
        try:
            self._service.find(model, current_request().pool_headers)
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


async def _list_models(registry: Any, service: PoolService) -> ModelList:
    listed: ModelList = await registry.show_available_models()
    base = service.names.base[0]
    for card in listed.data:
        card.default_pool = service.names.default_pool
    for name in (AUTO_POOL, *service.catalog.pools):
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
    service: PoolService,
    metrics: PoolMetrics,
    coverage: CoverageBook,
    request_log: RequestLog | None = None,
) -> FastAPI:
    """Build vLLM's app around the engine and teach it the pools' names."""
    tasks = await llm.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    models = app.state.openai_serving_models
    models.lora_requests = _PoolNames(service, metrics)
    models.show_available_models = partial(_list_models, models.registry, service)
    honours_priority = args.scheduling_policy == "priority"
    llm.attach_pools(service, metrics, coverage, request_log, honours_priority=honours_priority)
    return app


def metrics_registry() -> Any:
    """Return the registry that vLLM's /metrics shows."""
    return get_prometheus_registry()


# -- HTTP server --


def create_http_server(wrapped: AsgiApp, app: FastAPI, args: argparse.Namespace) -> uvicorn.Server:
    """Create uvicorn's server for `wrapped`, with vLLM's flags; signals are left to the caller."""
    options: dict[str, Any] = {
        "host": args.host,
        "port": args.port,
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "timeout_graceful_shutdown": 2,  # what is left then has had the drain's time
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "h11_max_incomplete_event_size": args.h11_max_incomplete_event_size,
    }
    if args.ssl_ciphers:
        options["ssl_ciphers"] = args.ssl_ciphers
    if (log_config := get_uvicorn_log_config(args)) is not None:
        options["log_config"] = log_config
    config = uvicorn.Config(wrapped, **options)
    config.h11_max_header_count = args.h11_max_header_count  # type: ignore[attr-defined]
    config.load()
    server: uvicorn.Server = NoSignalServer(config)
    app.state.server = server  # vLLM's error handler stops it when the engine is dead
    return server


def run_beside_server(
    server: uvicorn.Server, llm: PooledLLM, args: argparse.Namespace
) -> list[asyncio.Task[None]]:
    """Start what vLLM runs beside its server: the watchdog, and certificates read again."""
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
