"""Checkpoints of EMO in the released layout: opened with every check, read whole, written."""

from __future__ import annotations

import json
import logging
import math
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from emo_serve.checkpoints.checkpoint import ModelCheckpoint, check_shape
from emo_serve.checkpoints.companions import check_companions
from emo_serve.checkpoints.json_file import shown
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.checkpoints.weight_files import find_tensors, is_left_over
from emo_serve.emo.config import EmoConfig, load_config
from emo_serve.emo.model import EmoForCausalLM, EmoMoe, inverse_frequencies
from emo_serve.emo.tensor_names import (
    expected_names,
    expert_tensor_name,
    trunk_shapes,
)
from emo_serve.errors import CheckpointError, ConfigError

__all__ = [
    "Checkpoint",
    "load_model",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

_MOST_COUNTED = 100_000
_MOST_NAMED = 4


class Checkpoint(ModelCheckpoint):
    """A checkpoint directory of an EMO, every tensor of which has its place in the config."""

    def __init__(
        self, directory: Path, config: EmoConfig, files: dict[str, Path], opened: list[TensorFile]
    ) -> None:
        super().__init__(directory, config.facts, files, opened)
        self.config = config

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Read the config, the index and the trunk's headers, and check them against each other.

        Every tensor that the config needs must be listed, and no other except for buffers of other
        software, which are skipped. The trunk's must be there in the shapes that the config says;
        of the experts, one is looked at. The files beside the weights
        must have the shape that their readers expect.
        """
        directory = Path(directory)
        config = load_config(directory)
        check_companions(directory)
        checkpoint = cls(directory, config, *find_tensors(directory))
        checkpoint._check_complete()
        checkpoint._check_trunk()
        checkpoint._skip_left_over()
        checkpoint._check_width()
        _check_rope(directory, config)
        return checkpoint

    def _check_complete(self) -> None:
        absent = (name for name in expected_names(self.config) if name not in self._files)
        missing = list(islice(absent, _MOST_COUNTED + 1))  # a wrong config can ask for millions
        if missing:
            counted = len(missing) <= _MOST_COUNTED
            number = str(len(missing)) if counted else f"more than {_MOST_COUNTED}"
            raise CheckpointError(
                f"{self.directory}: {number} tensors are missing, the first is {min(missing)}"
            )

    def _skip_left_over(self) -> None:
        """Forget tensors that only other software uses; refuse any other that has no place."""
        known = set(expected_names(self.config))
        extra = sorted(name for name in self._files if name not in known)
        unknown = [name for name in extra if not is_left_over(name)]
        if unknown:
            raise CheckpointError(
                f"{self.directory}: {len(unknown)} tensors have no place in an EMO model of this"
                f" config: {', '.join(map(shown, unknown[:_MOST_NAMED]))}"
                f"{', ...' if len(unknown) > _MOST_NAMED else ''}; expected the config that the"
                " weights were saved with, or no such tensors"
            )
        for name in extra:
            del self._files[name]
        if extra:
            logger.info(
                "%s: skipped %d tensors that only other software uses, such as %s",
                self.directory,
                len(extra),
                extra[0],
            )

    def _check_trunk(self) -> None:
        for name, expected in trunk_shapes(self.config):
            check_shape(self.file_of(name), name, expected)


def _check_rope(directory: Path, config: EmoConfig) -> None:
    """Raise unless the parameters give frequencies to rotate by."""
    try:
        frequencies, scale = inverse_frequencies(config)
        is_usable = bool(torch.isfinite(frequencies).all()) and math.isfinite(scale)
    except Exception:  # transformers' formulas divide and take logarithms
        is_usable = False
    if not is_usable:
        raise ConfigError(
            f"{directory / 'config.json'}: rope_parameters is {shown(config.rope_parameters)};"
            " expected numbers that give finite frequencies"
        )


# -- the reference model --


def load_model(directory: Path | str, dtype: torch.dtype = torch.float32) -> EmoForCausalLM:
    """Read a whole checkpoint into the reference model, in eval mode."""
    checkpoint = Checkpoint.open(directory)
    model = EmoForCausalLM(checkpoint.config).to(dtype)
    state = {name: checkpoint.tensor(name) for name in checkpoint.trunk_names()}
    for index, moe in enumerate(checkpoint.config.moe_layers):
        if moe is not None:
            experts = [checkpoint.expert(index, expert) for expert in range(moe.num_experts)]
            prefix = f"model.layers.{index}.mlp."
            state[f"{prefix}w13"] = torch.stack([torch.cat([e.gate_FD, e.up_FD]) for e in experts])
            state[f"{prefix}w2"] = torch.stack([e.down_DF for e in experts])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{directory} does not fit its config.json: {error}") from error
    frequencies, _ = inverse_frequencies(checkpoint.config)  # .to(dtype) has rounded them
    model.model.inverse_frequencies = frequencies
    return model.eval()


def save_checkpoint(
    model: EmoForCausalLM, directory: Path | str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config.json and model.safetensors in the released layout."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("mlp.w13", "mlp.w2")):
            tensors[name] = tensor
    for index, layer in enumerate(model.model.layers):
        moe = layer.mlp
        if isinstance(moe, EmoMoe):
            for expert in range(moe.moe.num_experts):
                gate_FD, up_FD = moe.w13[expert].detach().chunk(2)
                tensors[expert_tensor_name(index, expert, "gate")] = gate_FD
                tensors[expert_tensor_name(index, expert, "up")] = up_FD
                tensors[expert_tensor_name(index, expert, "down")] = moe.w2[expert].detach()
    tensors = {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}
    path = directory / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable only by its owner
    config = model.config.to_dict()
    config.update(architectures=["EmoForCausalLM"], dtype=str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
