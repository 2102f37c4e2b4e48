"""vLLM's command line: parsed together with our flags, checked, and completed for our engine.

A namespace is never changed here: `with_values` makes a new one, so a namespace once passed on
stays as it is. Everything that can be refused without starting an engine raises ConfigError.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from emo_serve.config import ServeSettings, add_serve_flags
from emo_serve.errors import ConfigError, EmoServeError
from emo_serve.spelling import unrecognized
from emo_serve.vllm_plugin import SCHEDULER_CLS, WORKER_EXTENSION_CLS, worker_cls_for
from emo_serve.vllm_plugin.contract import (
    LOAD_FORMAT,
    PluginSettings,
    check_expert_dtype,
    check_moe_backend,
)

__all__ = [
    "engine_args",
    "parse_serve_args",
    "resolved",
    "with_engine_values",
    "with_values",
]

_RECORD_VARIABLE = "EMO_SERVE_RECORD_ROUTING"  # for benchmarks: 0 shows what recording costs

_SHARE = "gpu_memory_utilization"

_LOOPBACK = "127.0.0.1"  # vLLM's default is every interface

_T = TypeVar("_T")


def parse_serve_args(
    argv: Sequence[str], defaults_without_model: Mapping[str, object]
) -> argparse.Namespace:
    """Parse the flags of `vllm serve` and ours.

    Raises ConfigError for an unknown flag, and if vLLM's quick checks fail.

    Without `--host`, only this machine can connect. `is_memory_share_given` in the result says
    whether the user gives --gpu-memory-utilization: on a CPU its default is not used.

    A positional MODEL and `--model` mean the same; the result has it in `model_tag`. With neither,
    `defaults_without_model`, by the names in the namespace, replaces vLLM's defaults.
    """
    cli_env_setup()
    parser = _ServeParser(prog="emo-serve serve", conflict_handler="resolve")
    make_arg_parser(parser)
    _accept_lower_case(parser, "--log-level")
    parser.set_defaults(host=_LOOPBACK)
    default_model, default_share = parser.get_default("model"), parser.get_default(_SHARE)
    parser.set_defaults(**{_SHARE: None})
    add_serve_flags(parser)
    args: argparse.Namespace = parser.parse_args(list(argv))
    tag = args.model_tag
    if tag is None and args.model != default_model:
        tag = args.model
    if tag is None:
        parser.set_defaults(**defaults_without_model)
        args = parser.parse_args(list(argv))
    is_given = getattr(args, _SHARE) is not None
    if not is_given:
        args = with_values(args, **{_SHARE: default_share})
    # our --moe-backend replaces vLLM's flag, so vLLM's own field keeps its default
    args = with_values(args, model_tag=tag, moe_backend="auto", is_memory_share_given=is_given)
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return args


class _ServeParser(FlexibleArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(unrecognized(unknown, self._actions))
        return found, unknown


def _accept_lower_case(parser: argparse.ArgumentParser, flag: str) -> None:
    """Accept lower case for a flag whose values vLLM expects in capitals."""
    for action in parser._actions:
        if flag in action.option_strings:
            action.type = str.upper


def with_values(args: argparse.Namespace, **values: object) -> argparse.Namespace:
    """Return a copy of a namespace with some values replaced."""
    return argparse.Namespace(**{**vars(args), **values})


def with_engine_values(
    args: argparse.Namespace,
    settings: ServeSettings,
    num_slots: int,
    kv_cache_bytes: int | None = None,
    architecture: str | None = None,
    stream_slots: int = 0,
) -> argparse.Namespace:
    """Return the flags of an engine with our model, loader and workers.

    `args.model` is a local directory, `num_slots` the slots per layer, beside `stream_slots`, and
    `kv_cache_bytes` the KV cache of one worker, None to leave it to vLLM. `architecture` is our
    name for a model that vLLM has, too, None for the name in the checkpoint's config. Raises
    ConfigError for expert settings that this machine's device cannot run.
    """
    device = current_platform.device_type
    check_expert_dtype(settings.expert_dtype, settings.moe_backend, device)
    check_moe_backend(settings.moe_backend, device)
    ours = PluginSettings(
        num_slots=num_slots,
        stream_slots=stream_slots,
        num_pools=settings.max_pools,
        moe_backend=settings.moe_backend,
        expert_dtype=settings.expert_dtype,
        host_expert_bytes=settings.host_expert_bytes,
        records_routing=os.environ.get(_RECORD_VARIABLE) != "0",
    )
    if architecture is not None:
        overrides = {**(args.hf_overrides or {}), "architectures": [architecture]}
        args = with_values(args, hf_overrides=overrides)
    if stream_slots and args.scheduler_cls is None:
        args = with_values(args, scheduler_cls=SCHEDULER_CLS)
    if kv_cache_bytes is not None:
        args = with_values(args, kv_cache_memory_bytes=kv_cache_bytes)
    return with_values(
        args,
        load_format=LOAD_FORMAT,
        worker_cls=worker_cls_for(device),
        worker_extension_cls=WORKER_EXTENSION_CLS,
        additional_config={**(args.additional_config or {}), **ours.to_config()},
    )


def engine_args(args: argparse.Namespace) -> Any:
    """Return vLLM's AsyncEngineArgs for these flags; raises ConfigError."""
    return resolved(lambda: AsyncEngineArgs.from_cli_args(args))


def resolved(build: Callable[[], _T]) -> _T:
    """Build a config of vLLM's; raises ConfigError, in one line, for what vLLM refuses."""
    try:
        return build()
    except EmoServeError:
        raise
    except Exception as error:  # flags and the checkpoint's files: each way to fail is its own
        raise ConfigError(f"vLLM refuses these flags: {' '.join(str(error).split())}") from error
