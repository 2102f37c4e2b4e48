"""Checkpoints in the released layout: names, the safetensors index, lazy reads and checks.

An expert is three tensors, `model.layers.L.mlp.experts.E.{gate,up,down}_proj.weight`; everything
else is trunk. A tensor is read only when asked for, and its rows can be read alone (`tensor_file`).
Shapes are checked against the config before any byte of the tensor is read.

Shapes: D hidden size, F expert width.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from emo_serve.emo.config import EmoConfig, MoeLayer, load_config
from emo_serve.emo.model import EmoForCausalLM, EmoMoe, inverse_frequencies
from emo_serve.emo.tensor_file import TensorFile
from emo_serve.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "ExpertWeights",
    "expert_tensor_name",
    "gate_name",
    "load_model",
    "parse_expert_name",
    "save_checkpoint",
]

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_INDEX = "model.safetensors.index.json"
_MATRICES = ("gate", "up", "down")


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


def expert_tensor_name(layer: int, expert: int, matrix: str) -> str:
    """Return the name of an expert's matrix: 'gate', 'up' or 'down'."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"


def parse_expert_name(name: str) -> tuple[int, int, str] | None:
    """Return (layer, expert, matrix) of an expert's tensor, None for the trunk's."""
    match = _EXPERT.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


def gate_name(layer: int) -> str:
    """Return the name of a MoE layer's gate."""
    return f"model.layers.{layer}.mlp.gate.weight"


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
        """Read the config and the index; check that every tensor the config needs is listed."""
        directory = Path(directory)
        config = load_config(directory)
        checkpoint = cls(directory, config, *_tensor_files(directory))
        missing = sorted(set(_expected_names(config)) - set(checkpoint._files))
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}"
            )
        return checkpoint

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of one expert in the checkpoint's dtype."""
        layer = next(i for i, moe in enumerate(self.config.moe_layers) if moe is not None)
        name = expert_tensor_name(layer, 0, "gate")
        itemsize = self.file_of(name).dtype(name).itemsize
        return 3 * self.config.hidden_size * self.config.intermediate_size * itemsize

    def trunk_names(self) -> Iterator[str]:
        """Yield the names of all tensors that are not an expert's."""
        return (name for name in self._files if parse_expert_name(name) is None)

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor."""
        return self.file_of(name).read(name)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one whole expert."""
        self.check_expert(layer, expert)
        names = [expert_tensor_name(layer, expert, matrix) for matrix in _MATRICES]
        return ExpertWeights(*(self.tensor(name) for name in names))

    def check_expert(self, layer: int, expert: int) -> None:
        """Raise unless an expert's files are complete, unchanged, and hold it; reads no weights."""
        self.check_experts([(layer, expert)])

    def check_experts(self, experts: Iterable[tuple[int, int]]) -> None:
        """Check each (layer, expert) as `check_expert` does, but each file only once."""
        files = {self._checked_file(*place, matrix) for place in experts for matrix in _MATRICES}
        for file in files:
            file.check()

    def _checked_file(self, layer: int, expert: int, matrix: str) -> TensorFile:
        """Return the file of one matrix after checking its shape and dtype."""
        width, hidden = self.config.intermediate_size, self.config.hidden_size
        name = expert_tensor_name(layer, expert, matrix)
        file = self.file_of(name)
        expected = (hidden, width) if matrix == "down" else (width, hidden)
        shape = file.info(name).shape
        if shape != expected:
            raise CheckpointError(
                f"{file.path}: {name} has shape {shape}, the config says {expected}"
            )
        file.dtype(name)
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
                self._open[path] = TensorFile(path)
            return self._open[path]


def _tensor_files(directory: Path) -> tuple[dict[str, Path], list[TensorFile]]:
    """Map each tensor to its file: by the index, or by opening the safetensors files."""
    index = directory / _INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
        files = {name: directory / file for name, file in weight_map.items()}
        absent = sorted({path for path in files.values() if not path.exists()})
        if absent:
            raise CheckpointError(f"{index} names {absent[0].name}, which is not in {directory}")
        return files, []
    opened = [TensorFile(path) for path in sorted(directory.glob("*.safetensors"))]
    files = {name: file.path for file in opened for name in file.names}
    if not files:
        raise CheckpointError(f"{directory} has no *.safetensors files")
    return files, opened


def _expected_names(config: EmoConfig) -> Iterator[str]:
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for index, moe in enumerate(config.moe_layers):
        prefix = f"model.layers.{index}."
        for norm in ("pre_attention_layernorm", "pre_feedforward_layernorm"):
            yield f"{prefix}{norm}.weight"
        for projection in "qkvo":
            yield f"{prefix}self_attn.{projection}_proj.weight"
            if config.attention_bias:
                yield f"{prefix}self_attn.{projection}_proj.bias"
        if moe is None:
            for matrix in ("gate", "up", "down"):
                yield f"{prefix}mlp.{matrix}_proj.weight"
                if config.dense_mlp_bias:
                    yield f"{prefix}mlp.{matrix}_proj.bias"
            continue
        yield gate_name(index)
        yield from _expert_names(index, moe)


def _expert_names(index: int, moe: MoeLayer) -> Iterator[str]:
    for expert in range(moe.num_experts):
        for matrix in _MATRICES:
            yield expert_tensor_name(index, expert, matrix)


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
