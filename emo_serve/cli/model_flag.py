"""The flag --model of commands on pool files, and what they learn from the checkpoint.

transformers and torch are imported when a checkpoint is opened.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emo_serve.emo.config import MoeLayer

__all__ = ["ModelFacts", "add_model_flag"]


def add_model_flag(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add --model; `purpose` is its line of help."""
    command.add_argument("--model", type=Path, metavar="DIR", help=purpose)


@dataclass(frozen=True)
class ModelFacts:
    """What pool files are checked and measured against; all None without --model."""

    layers: tuple[MoeLayer | None, ...] | None = None
    fingerprint: str | None = None
    expert_bytes: int | None = None

    @classmethod
    def open(cls, directory: Path | None) -> ModelFacts:
        """Read the checkpoint of that directory; raises ConfigError."""
        if directory is None:
            return cls()
        from emo_serve.emo.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(directory)
        layers = checkpoint.config.moe_layers
        return cls(layers, checkpoint.fingerprint(), checkpoint.expert_bytes)

    @property
    def experts_per_layer(self) -> list[int] | None:
        """Return the number of experts of each MoE layer, dense layers left out."""
        return None if self.layers is None else [moe.num_experts for moe in self.layers if moe]
