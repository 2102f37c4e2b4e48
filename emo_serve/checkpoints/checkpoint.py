"""A checkpoint directory of any family, read lazily through the facts of its model.

A tensor is read only when asked for, and its rows can be read alone (`tensor_file`). Shapes of
experts are checked against the facts before any byte of them is read. What is not an expert's is
trunk.

Shapes: D hidden size, F expert width.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.checkpoints.weight_files import open_weights
from emo_serve.errors import CheckpointError
from emo_serve.facts import MATRICES, ModelFacts

__all__ = ["ExpertWeights", "ModelCheckpoint", "check_shape"]


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


class ModelCheckpoint:
    """A checkpoint directory, opened for lazy reads.

    `files` maps each tensor to its file, some of which may be `opened`. Safe for use by several
    threads. A file is opened when first needed and then kept open; if it changes afterwards, that
    is an error. Raises CheckpointError naming file, tensor, value and what was expected.
    """

    def __init__(
        self, directory: Path, facts: ModelFacts, files: dict[str, Path], opened: list[TensorFile]
    ) -> None:
        self.directory = directory
        self.facts = facts
        self._files = files
        self._open = {file.path: file for file in opened}
        self._opening = threading.Lock()

    # -- what it holds --

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of one expert in the checkpoint's dtype, 0 for a dense model."""
        layer = self.facts.first_moe_layer
        if layer is None:
            return 0
        name = self.facts.names.expert(layer, 0, "gate")
        itemsize = self.file_of(name).dtype(name).itemsize
        return 3 * self.facts.hidden_size * self.facts.expert_width * itemsize

    @property
    def num_trunk_parameters(self) -> int:
        """Return how many numbers all tensors together have that are not an expert's."""
        infos = (self.file_of(name).info(name) for name in self.trunk_names())
        return sum(math.prod(info.shape) for info in infos)

    def trunk_names(self) -> Iterator[str]:
        """Yield the names of all tensors that are not an expert's."""
        return (name for name in self._files if self.facts.names.parse(name) is None)

    # -- reads --

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor."""
        return self.file_of(name).read(name)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one whole expert."""
        self.check_expert(layer, expert)
        names = [self.facts.names.expert(layer, expert, matrix) for matrix in MATRICES]
        return ExpertWeights(*(self.tensor(name) for name in names))

    def file_of(self, name: str) -> TensorFile:
        """Return the open file that holds a tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        path = self._files[name]
        with self._opening:
            if path not in self._open:
                self._open[path] = open_weights(path)
            return self._open[path]

    def fingerprint(self) -> str:
        """Return a hex digest of everything a pool depends on: layers, routing rules and gates."""
        digest = hashlib.sha256()
        layers = [None if moe is None else vars(moe) for moe in self.facts.moe_layers]
        facts = {"layers": layers, "norm_topk_prob": self.facts.norm_topk_prob}
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for index, moe in enumerate(self.facts.moe_layers):
            if moe is not None:
                gate = self.tensor(self.facts.names.router(index)).float()
                digest.update(gate.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- checks --

    def check_expert(self, layer: int, expert: int) -> None:
        """Raise unless an expert's files are complete, unchanged, and hold it; reads no weights."""
        self.check_experts([(layer, expert)])

    def check_experts(self, experts: Iterable[tuple[int, int]]) -> None:
        """Check each (layer, expert) as `check_expert` does, but each file only once."""
        files = {self._checked_file(*place, matrix) for place in experts for matrix in MATRICES}
        for file in files:
            file.check()

    def _check_width(self) -> None:
        """Refuse a config whose width no expert has; a single damaged expert fails when read."""
        layer = self.facts.first_moe_layer
        if layer is None:
            return
        first: CheckpointError | None = None
        for expert in range(self.facts.experts_per_layer[layer]):
            try:
                self._checked_file(layer, expert, "gate")
            except CheckpointError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise first

    def _checked_file(self, layer: int, expert: int, matrix: str) -> TensorFile:
        """Return the file of one matrix after checking its shape and dtype."""
        width, hidden = self.facts.expert_width, self.facts.hidden_size
        name = self.facts.names.expert(layer, expert, matrix)
        file = self.file_of(name)
        check_shape(file, name, (hidden, width) if matrix == "down" else (width, hidden))
        return file


def check_shape(file: TensorFile, name: str, expected: tuple[int, ...]) -> None:
    """Raise unless a tensor has this shape, and a dtype that weights may have."""
    shape = file.info(name).shape
    if shape != expected:
        raise CheckpointError(f"{file.path}: {name} has shape {shape}, the config says {expected}")
    file.dtype(name)
