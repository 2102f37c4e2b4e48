"""Checkpoints in the released layout: names, the safetensors index, lazy reads and checks.

An expert is three tensors, `model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`; everything
else is trunk. A tensor is read only when asked for, and its rows can be read alone (`tensor_file`).
Shapes are checked against the config before any byte of the tensor is read.

Shapes: D hidden size, F expert width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from emo_serve.emo.companions import check_companions
from emo_serve.emo.config import EmoConfig, load_config
from emo_serve.emo.json_file import shown
from emo_serve.emo.model import EmoForCausalLM, EmoMoe, inverse_frequencies
from emo_serve.emo.tensor_file import TensorFile
from emo_serve.emo.tensor_names import (
    MATRICES,
    expected_names,
    expert_tensor_name,
    gate_name,
    is_left_over,
    parse_expert_name,
    trunk_shapes,
)
from emo_serve.emo.weight_files import find_tensors, open_weights
from emo_serve.errors import CheckpointError, ConfigError

__all__ = [
    "Checkpoint",
    "ExpertWeights",
    "load_model",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

_MOST_COUNTED = 100_000
_MOST_NAMED = 4


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's matrices, gate_FD, up_FD and down_DF, in the checkpoint's dtype."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    @property
    def num_bytes(self) -> int:
        """Return the bytes these matrices hold."""
        return sum(w.numel() * w.element_size() for w in (self.gate_FD, self.up_FD, self.down_DF))


class Checkpoint:
    """A checkpoint directory, opened for lazy reads.

    Safe for use by several threads. A file is opened when first needed and then kept open; if it
    changes afterwards, that is an error. Raises CheckpointError naming file, tensor, value and
    what was expected.
    """

    def __init__(
        self, directory: Path, config: EmoConfig, files: dict[str, Path], opened: list[TensorFile]
    ) -> None:
        self.directory = directory
        self.config = config
        self._files = files
        self._open = {file.path: file for file in opened}
        self._opening = threading.Lock()

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
            _check_shape(self.file_of(name), name, expected)

    def _check_width(self) -> None:
        """Refuse a config whose width no expert has; a single damaged expert fails when read."""
        layers = enumerate(self.config.moe_layers)
        index, moe = next(((i, moe) for i, moe in layers if moe is not None), (0, None))
        first: CheckpointError | None = None
        for expert in range(moe.num_experts if moe else 0):
            try:
                self._checked_file(index, expert, "gate")
            except CheckpointError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise first

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of one expert in the checkpoint's dtype."""
        layer = next(i for i, moe in enumerate(self.config.moe_layers) if moe is not None)
        name = expert_tensor_name(layer, 0, "gate")
        itemsize = self.file_of(name).dtype(name).itemsize
        return 3 * self.config.hidden_size * self.config.intermediate_size * itemsize

    @property
    def num_trunk_parameters(self) -> int:
        """Return how many numbers all tensors together have that are not an expert's."""
        return sum(math.prod(shape) for _, shape in trunk_shapes(self.config))

    def trunk_names(self) -> Iterator[str]:
        """Yield the names of all tensors that are not an expert's."""
        return (name for name in self._files if parse_expert_name(name) is None)

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor."""
        return self.file_of(name).read(name)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one whole expert."""
        self.check_expert(layer, expert)
        names = [expert_tensor_name(layer, expert, matrix) for matrix in MATRICES]
        return ExpertWeights(*(self.tensor(name) for name in names))

    def check_expert(self, layer: int, expert: int) -> None:
        """Raise unless an expert's files are complete, unchanged, and hold it; reads no weights."""
        self.check_experts([(layer, expert)])

    def check_experts(self, experts: Iterable[tuple[int, int]]) -> None:
        """Check each (layer, expert) as `check_expert` does, but each file only once."""
        files = {self._checked_file(*place, matrix) for place in experts for matrix in MATRICES}
        for file in files:
            file.check()

    def _checked_file(self, layer: int, expert: int, matrix: str) -> TensorFile:
        """Return the file of one matrix after checking its shape and dtype."""
        width, hidden = self.config.intermediate_size, self.config.hidden_size
        name = expert_tensor_name(layer, expert, matrix)
        file = self.file_of(name)
        _check_shape(file, name, (hidden, width) if matrix == "down" else (width, hidden))
        return file

    def fingerprint(self) -> str:
        """Return a hex digest of everything a pool depends on: layers, routing rules and gates."""
        digest = hashlib.sha256()
        layers = [None if moe is None else vars(moe) for moe in self.config.moe_layers]
        facts = {"layers": layers, "norm_topk_prob": self.config.norm_topk_prob}
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for index, moe in enumerate(self.config.moe_layers):
            if moe is not None:
                gate = self.tensor(gate_name(index)).float()
                digest.update(gate.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- files --

    def file_of(self, name: str) -> TensorFile:
        """Return the open file that holds a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        path = self._files[name]
        with self._opening:
            if path not in self._open:
                self._open[path] = open_weights(path)
            return self._open[path]


def _check_shape(file: TensorFile, name: str, expected: tuple[int, ...]) -> None:
    """Raise unless a tensor has this shape, and a dtype that weights may have."""
    shape = file.info(name).shape
    if shape != expected:
        raise CheckpointError(f"{file.path}: {name} has shape {shape}, the config says {expected}")
    file.dtype(name)


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
