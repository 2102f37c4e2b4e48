"""From the command line to one frozen `Launch`: everything decided before the engine starts.

Everything that can be refused is refused here, within seconds, with a ConfigError. Nothing is
started here, and a Launch never changes.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.config import ServeSettings
from emo_serve.errors import ConfigError
from emo_serve.families.opening import open_checkpoint
from emo_serve.server.auto.choice import read_auto_examples
from emo_serve.server.startup.checkpoint import resolve_checkpoint
from emo_serve.server.startup.machine_memory import read_limits
from emo_serve.server.startup.plan import StartPlan, make_plan
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.startup.unsupported_flags import refuse_unsupported
from emo_serve.server.vllm_adapter.engine_sizes import engine_sizes
from emo_serve.server.vllm_adapter.flags import (
    parse_serve_args,
    with_engine_values,
    with_values,
)

__all__ = ["DefaultModel", "Keys", "Launch", "check_flags", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DefaultModel:
    """The model to serve when no MODEL is given, and defaults of vLLM's flags for it alone."""

    name: str
    directory: Path
    pools_dir: Path
    flag_defaults: Mapping[str, object]


@dataclass(frozen=True)
class Keys:
    """The keys that the server accepts from clients and operators.

    `variable` is the environment variable that a client's shell should keep an API key in; None if
    no API key is set.
    """

    api: tuple[str, ...]
    admin: tuple[str, ...]
    variable: str | None

    @classmethod
    def read(cls, args: argparse.Namespace, settings: ServeSettings) -> Keys:
        """Read the keys from the flags and the environment."""
        variable = "EMO_SERVE_API_KEY" if args.api_key else "VLLM_API_KEY"
        given = args.api_key or [os.environ.get("VLLM_API_KEY", "")]
        api = tuple(filter(None, given))
        return cls(api, settings.admin_api_keys, variable if api else None)


@dataclass(frozen=True)
class Launch:
    """Everything decided for one start; `args` are the flags for vLLM's engine and HTTP server."""

    args: argparse.Namespace
    settings: ServeSettings
    plan: StartPlan
    checkpoint: ModelCheckpoint
    keys: Keys
    auto_examples: Mapping[str, Sequence[str]]


def prepare(argv: Sequence[str], default_model: DefaultModel, progress: StartProgress) -> Launch:
    """Make all decisions from the arguments after `emo-serve serve`; raises ConfigError."""
    args, settings = _read_flags(argv, default_model)
    progress.stage("reading the checkpoint")
    persists = settings.pools_dir is not None  # the shipped pools are not ours to change
    args, settings = _with_model(args, settings, default_model)
    checkpoint = open_checkpoint(args.model)  # first: it tells best why a model is not served
    if args.pipeline_parallel_size > 1 and checkpoint.facts.architecture is not None:
        raise ConfigError(
            f"--pipeline-parallel-size is {args.pipeline_parallel_size}: only EMO models can be"
            f" divided into stages, not {checkpoint.facts.family}; use --tensor-parallel-size"
        )
    sizes = engine_sizes(args)
    limits = read_limits(sizes.cpu.nodes) if sizes.cpu else ()
    plan = make_plan(settings, checkpoint, args.served_model_name, sizes, limits, persists=persists)
    memory, kv_bytes = plan.memory, None
    if memory is not None:
        kv_bytes = sizes.kv_bytes_of_one(memory.kv_bytes)
        if memory.excess_bytes:
            logger.warning("these flags take more memory than there is: %s", memory.account())
    keys = Keys.read(args, settings)
    return Launch(
        with_engine_values(
            args,
            settings,
            plan.num_slots,
            kv_bytes,
            architecture=checkpoint.facts.architecture,
            stream_slots=plan.stream_slots,
        ),
        settings,
        plan,
        checkpoint,
        keys,
        read_auto_examples(settings),
    )


def check_flags(argv: Sequence[str], default_model: DefaultModel, *, opens_model: bool) -> None:
    """Refuse at once what `prepare` would refuse of the flags, and of the model's files.

    Raises ConfigError. Without `opens_model`, the model may be on another machine.
    """
    args, settings = _read_flags(argv, default_model)
    if opens_model:
        args, _ = _with_model(args, settings, default_model)
        open_checkpoint(args.model)


def _read_flags(
    argv: Sequence[str], default_model: DefaultModel
) -> tuple[argparse.Namespace, ServeSettings]:
    _check_metrics_directory(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
    args = parse_serve_args(argv, default_model.flag_defaults)
    settings = ServeSettings.from_args(args)
    refuse_unsupported(args)
    return args, settings


def _check_metrics_directory(path: str | None) -> None:
    """Refuse a directory for the files of counters in which none can be written."""
    if path is not None and not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"PROMETHEUS_MULTIPROC_DIR is {path!r}; expected a directory that can be written; make"
            " one, or unset the variable"
        )


def _with_model(
    args: argparse.Namespace, settings: ServeSettings, default_model: DefaultModel
) -> tuple[argparse.Namespace, ServeSettings]:
    """Return flags whose model is a local directory, served under the name the user gave."""
    if settings.model is None:
        directory = default_model.directory
        pools_dir = settings.pools_dir or default_model.pools_dir
        settings = replace(settings, pools_dir=pools_dir)
    else:
        directory = resolve_checkpoint(
            settings.model, args.revision, args.download_dir, args.hf_token
        )
    names = args.served_model_name or [settings.model or default_model.name]
    located = with_values(
        args, model=str(directory), model_tag=str(directory), served_model_name=names
    )
    return located, settings
