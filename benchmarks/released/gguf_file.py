"""An EMO checkpoint's weights as an OLMoE in a GGUF file, for llama.cpp: same sizes, same numbers.

Matrices stay bfloat16; norms and gates become float32, as llama.cpp's own converter writes them.
Two things differ from EMO: an OLMoE has no shared expert, so a token chooses all of its experts
freely (EMO: one is given, the others are chosen; as many are computed), and it normalises queries
and keys (here with weights of one). The tokenizer is "none": the vocabulary has its size and no
text, so prompts are token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from emo_serve.emo.tensor_names import expert_tensor_name, gate_name
from emo_serve.facts import MATRICES

__all__ = ["GgufTensor", "Weights", "gguf_tensors", "write_gguf"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file and where it comes from."""

    name: str
    sources: tuple[str, ...]
    """The checkpoint's tensors: one, several to stack, or none for ones."""
    shape: tuple[int, ...]
    is_bfloat16: bool = True


def gguf_tensors(config: Mapping[str, Any]) -> Iterator[GgufTensor]:
    """Yield the tensors of an OLMoE with an EMO model's sizes."""
    hidden, width, experts = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_experts")
    )
    ends = (config["vocab_size"], hidden)
    yield GgufTensor("token_embd.weight", ("model.embed_tokens.weight",), ends)
    yield GgufTensor("output.weight", ("lm_head.weight",), ends)
    yield GgufTensor("output_norm.weight", ("model.norm.weight",), (hidden,), False)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    for layer in range(config["num_hidden_layers"]):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        norms = {"attn": ("pre_attention_layernorm",), "ffn": ("pre_feedforward_layernorm",)}
        for norm, source in (norms | {"attn_q": (), "attn_k": ()}).items():
            sources = tuple(f"{there}.{name}.weight" for name in source)
            yield GgufTensor(f"{here}.{norm}_norm.weight", sources, (hidden,), False)
        for matrix, source in {"q": "q", "k": "k", "v": "v", "output": "o"}.items():
            sources = (f"{there}.self_attn.{source}_proj.weight",)
            yield GgufTensor(f"{here}.attn_{matrix}.weight", sources, (hidden, hidden))
        gate = f"{here}.ffn_gate_inp.weight"
        yield GgufTensor(gate, (gate_name(layer),), (experts, hidden), False)
        for matrix in MATRICES:
            sources = tuple(expert_tensor_name(layer, each, matrix) for each in range(experts))
            shape = (experts, *shapes[matrix])
            yield GgufTensor(f"{here}.ffn_{matrix}_exps.weight", sources, shape)


def write_gguf(path: Path, model: Path) -> Path:
    """Write a checkpoint's weights to a GGUF file, a tensor at a time, and return its path."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    tensors = list(gguf_tensors(config))
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType.BF16 if tensor.is_bfloat16 else None
        dtype = np.dtype(np.uint16 if tensor.is_bfloat16 else np.float32)
        num_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = Weights(model)
    for tensor in tensors:
        writer.write_tensor_data(weights.of(tensor))
    writer.close()
    return path


class Weights:
    """The checkpoint's tensors by name; its files are mapped, not read."""

    def __init__(self, model: Path) -> None:
        index = json.loads((model / "model.safetensors.index.json").read_text())
        self._file_of: dict[str, str] = index["weight_map"]
        files = set(self._file_of.values())
        self._files = {file: safe_open(model / file, framework="pt") for file in files}

    def _read(self, name: str) -> Tensor:
        return self._files[self._file_of[name]].get_tensor(name)

    def of(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """Return what the file holds for a tensor, bfloat16 as the same bits in uint16."""
        parts = [self._read(name) for name in tensor.sources]
        if not parts:
            return np.ones(tensor.shape, np.float32)
        whole = torch.stack(parts) if len(tensor.shape) > parts[0].ndim else parts[0]
        assert tuple(whole.shape) == tensor.shape
        if tensor.is_bfloat16:
            return whole.bfloat16().view(torch.uint16).numpy()
        return whole.float().numpy()
