"""The flag --model of commands on pool files, and what they learn from the checkpoint.

It takes what `emo-serve serve` takes: a directory, or a name on the Hub, whose files are downloaded
once and kept in the Hub's cache. transformers and torch are imported when a checkpoint is opened.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from emo_serve.facts import MoeLayer

__all__ = ["KnownModel", "add_model_flag", "directory_of"]


def add_model_flag(
    command: argparse.ArgumentParser, purpose: str, *, is_required: bool = False
) -> None:
    """Add --model; `purpose` is its line of help."""
    command.add_argument(
        "--model",
        required=is_required,
        metavar="MODEL",
        help=f"{purpose}: a directory, or a name on the Hub",
    )


def directory_of(model: str | Path) -> Path:
    """Return the checkpoint that --model names, downloaded first if need be; raises ConfigError."""
    from emo_serve.server.startup.checkpoint import resolve_checkpoint

    return resolve_checkpoint(str(model), None, None, None, flag="--model")


@dataclass(frozen=True)
class KnownModel:
    """What pool files are checked and measured against; all None without --model."""

    layers: tuple[MoeLayer | None, ...] | None = None
    fingerprint: str | None = None
    expert_bytes: int | None = None

    @classmethod
    def open(cls, model: str | None) -> KnownModel:
        """Read the checkpoint that --model names; raises ConfigError."""
        if model is None:
            return cls()
        from emo_serve.families.opening import open_checkpoint

        checkpoint = open_checkpoint(directory_of(model))
        layers = checkpoint.facts.moe_layers
        return cls(layers, checkpoint.fingerprint(), checkpoint.expert_bytes)

    @property
    def experts_per_layer(self) -> list[int] | None:
        """Return the number of experts of each MoE layer, dense layers left out."""
        return None if self.layers is None else [moe.num_experts for moe in self.layers if moe]
