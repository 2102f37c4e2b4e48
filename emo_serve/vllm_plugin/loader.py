"""The load format `emo`: the trunk now, experts when the front end asks for them.

Replaces vLLM's DefaultModelLoader, which reads every tensor of the checkpoint. Here start-up reads
only the trunk; loads (`loads.py`) read the rest, expert by expert, from the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.errors import ConfigError
from emo_serve.families.opening import open_checkpoint
from emo_serve.vllm_plugin.contract import LOAD_FORMAT
from emo_serve.vllm_plugin.expert_store import ExpertStore
from emo_serve.vllm_plugin.slot_host import SlotHost, slot_host_of

__all__ = ["EmoModelLoader", "register_loader"]


class EmoModelLoader(BaseModelLoader):
    """Read a checkpoint from a local directory."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Refuse a Hub name: `emo-serve serve` resolves it to a directory before vLLM starts."""
        if not Path(model_config.model).is_dir():
            raise ConfigError(
                f"--load-format emo needs a local directory, not {model_config.model!r}"
            )

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Load the trunk; without a front end, all experts too."""
        self.download_model(model_config)
        checkpoint, host = open_checkpoint(model_config.model), slot_host_of(model)
        store = host.open_store(checkpoint)
        model.load_weights(_tensors(checkpoint, host, store))


def _tensors(
    checkpoint: ModelCheckpoint, host: SlotHost, store: ExpertStore
) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.trunk_names():
        tensor = checkpoint.tensor(name)
        store.count_trunk(tensor.nbytes)
        yield name, tensor
    if not host.holds_all:
        return
    for name in checkpoint.facts.expert_names():
        yield name, checkpoint.tensor(name)


def register_loader() -> None:
    """Register the load format once in this process."""
    from vllm.config.load import LoadConfig

    try:
        get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    except ValueError:
        register_model_loader(LOAD_FORMAT)(EmoModelLoader)
