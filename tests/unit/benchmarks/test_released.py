"""The released size: the prompts, and the file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness.random_checkpoint import write_pools
from benchmarks.released import llama_cpp
from benchmarks.released.gguf_file import GgufTensor, Weights, gguf_tensors
from benchmarks.released.serving import LOADS, POOLS, prompts_of
from emo_serve.facts import MoeLayer
from emo_serve.pools.document import read_pool

SIZES = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 3, "vocab_size": 16}


def test_no_two_clients_send_equal_prompts() -> None:
    clients = max(sent.clients for sent in LOADS)
    for domain in POOLS:
        prompts = {tuple(prompt[:8]) for prompt in prompts_of(domain)}
        assert len(prompts) >= clients


def test_random_pools_have_every_smaller_size(tmp_path: Path) -> None:
    config = {**SIZES, "num_experts": 8, "num_shared_experts": 1, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pool = read_pool(write_pools(tmp_path / "pools", tmp_path, ["one"], 4) / "one.json")
    smaller = pool.cut(2, [MoeLayer(8, 1, (), 2)] * 2)
    for whole, part in zip(pool.expert_ids, smaller.expert_ids, strict=True):
        assert len(whole) == 4
        assert len(part) == 2
        assert 7 in part
        assert set(part) < set(whole)


# -- the file for llama.cpp --


def test_an_olmoe_has_the_tensors_of_its_architecture_and_the_checkpoint_s_sizes() -> None:
    tensors = {each.name: each for each in gguf_tensors({**SIZES, "num_hidden_layers": 1})}
    per_layer = "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm"
    per_layer += " ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
    names = {f"blk.0.{name}.weight" for name in per_layer.split()}
    assert set(tensors) == names | {"token_embd.weight", "output.weight", "output_norm.weight"}
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert down.shape == (3, 8, 4)
    assert down.sources[2] == "model.layers.0.mlp.experts.2.down_proj.weight"
    single = {name for name, each in tensors.items() if not each.is_bfloat16}
    assert single == {name for name in tensors if "norm" in name or "gate_inp" in name}


def test_weights_keep_their_bits_are_stacked_or_are_ones(tmp_path: Path) -> None:
    a, b = (torch.randn(2, 3).bfloat16() for _ in range(2))
    save_file({"a": a, "b": b}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = Weights(tmp_path)
    stacked = weights.of(GgufTensor("s", ("a", "b"), (2, 2, 3)))
    assert stacked.dtype == np.uint16
    assert torch.equal(torch.from_numpy(stacked).view(torch.bfloat16), torch.stack([a, b]))
    assert weights.of(GgufTensor("f", ("a",), (2, 3), False)).tolist() == a.float().tolist()
    assert weights.of(GgufTensor("n", (), (4,), False)).tolist() == [1, 1, 1, 1]


def test_a_kind_of_llama_cpp_names_its_threads() -> None:
    assert llama_cpp.threads_of("llama.cpp-2") == 2
    assert llama_cpp.threads_of("one") is None
