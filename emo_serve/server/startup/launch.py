"""From the command line to one frozen `Launch`: everything a start decides before the engine runs.

Whatever can be refused is refused here, in seconds, with a ConfigError; nothing is started and
nothing is changed afterwards.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emo_serve.config import ServeSettings
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.server.auto.choice import read_auto_examples
from emo_serve.server.startup.checkpoint import resolve_checkpoint
from emo_serve.server.startup.plan import StartPlan, make_plan
from emo_serve.server.startup.unsupported_flags import refuse_unsupported
from emo_serve.server.vllm_adapter.flags import (
    dtype_bytes,
    parse_serve_args,
    with_engine_values,
    with_values,
)

__all__ = ["DefaultModel", "Keys", "Launch", "prepare"]


@dataclass(frozen=True)
class DefaultModel:
    """What is served when no MODEL is given, and the vLLM flags' defaults for it alone."""

    name: str
    directory: Path
    pools_dir: Path
    flag_defaults: Mapping[str, object]


@dataclass(frozen=True)
class Keys:
    """The keys that clients and operators need.

    `variable` names an environment variable to hold an API key in a shell; None if none is set.
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

    @property
    def known_to_vllm(self) -> list[str] | None:
        """Return the keys that vLLM's own check must let through; None turns it off."""
        return [*self.api, *self.admin] if self.api else None


@dataclass(frozen=True)
class Launch:
    """One decided start. `args` are vLLM's flags as its engine and its HTTP server take them."""

    args: argparse.Namespace
    settings: ServeSettings
    plan: StartPlan
    checkpoint: Checkpoint
    keys: Keys
    auto_examples: Mapping[str, Sequence[str]]


def prepare(argv: Sequence[str], default_model: DefaultModel) -> Launch:
    """Decide a start from the arguments after `emo-serve serve`; raises ConfigError."""
    args = parse_serve_args(argv, default_model.flag_defaults)
    settings = ServeSettings.from_args(args)
    refuse_unsupported(args)
    persists = settings.pools_dir is not None  # the shipped pools are not ours to change
    args, settings = _with_model(args, settings, default_model)
    checkpoint = Checkpoint.open(Path(args.model))  # first: it knows best what is not an EMO
    plan = make_plan(
        settings,
        checkpoint,
        args.served_model_name,
        dtype_bytes(args),
        args.tensor_parallel_size,
        persists=persists,
    )
    keys = Keys.read(args, settings)
    return Launch(
        with_engine_values(with_values(args, api_key=keys.known_to_vllm), settings, plan.num_slots),
        settings,
        plan,
        checkpoint,
        keys,
        read_auto_examples(settings),
    )


def _with_model(
    args: argparse.Namespace, settings: ServeSettings, default_model: DefaultModel
) -> tuple[argparse.Namespace, ServeSettings]:
    """Return flags whose model is a directory, named as the user named it, and its pools."""
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
