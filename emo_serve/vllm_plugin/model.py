"""EmoForCausalLM for vLLM: a pre-norm decoder whose MoE layers route inside pools.

Everything but the MoE layer is built of vLLM's own blocks, so attention, tensor parallelism and
compilation are vLLM's. `forward` takes one argument more than other models: `pool_rows`, one pool
row per token, which the model runner supplies (see `batch_pools`). Without it every token routes in
the base pool, as under plain `vllm serve`. The model's `slot_host` owns what is in the slots.

Under pipeline parallelism each stage has its own layers only, and their slots; the runner of each
stage supplies the rows.

Shapes: T tokens of the step (padding included), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from emo_serve.checkpoints.weight_files import is_left_over
from emo_serve.emo.config import EmoConfig
from emo_serve.errors import CheckpointError
from emo_serve.facts import MoeLayer
from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.batch_pools import EmoModelState
from emo_serve.vllm_plugin.contract import BASE_POOL_ROW, PluginSettings
from emo_serve.vllm_plugin.hosting import host_for
from emo_serve.vllm_plugin.moe import PooledMoE
from emo_serve.vllm_plugin.settings import (
    backend_for,
    emo_config,
    read_settings,
    refuse_what_cannot_work,
    rope_for_vllm,
)
from emo_serve.vllm_plugin.stage import Stage
from emo_serve.vllm_plugin.vocabulary import hold_once

__all__ = ["EmoForCausalLM"]


class EmoForCausalLM(nn.Module, SupportsPP):
    """The model vLLM's runners call."""

    base_rows: Tensor

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = emo_config(vllm_config)
        settings = read_settings(vllm_config)
        refuse_what_cannot_work(vllm_config)
        backend = backend_for(vllm_config, settings, torch.get_default_device())
        self.model = _EmoModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            settings=settings,
            backend=backend,
        )
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], self.config.hidden_size
        )
        hold_once(self)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer(
            "base_rows", torch.full((max_tokens,), BASE_POOL_ROW), persistent=False
        )
        blocks = [getattr(layer, "mlp", None) for layer in self.model.layers]
        self.slot_host = host_for(
            vllm_config,
            [block if isinstance(block, PooledMoE) else None for block in blocks],
            backend,
            self.base_rows.device,
            self.model.stage,
        )

    @staticmethod
    def get_model_state_cls() -> type[EmoModelState]:
        """Tell vLLM's V2 runner how requests' pools reach `forward`."""
        return EmoModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of token ids."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        pool_rows: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Return final hidden states [T, D], or what the next stage needs.

        `pool_rows` may be longer than T.
        """
        steps = self.slot_host.steps
        steps.begin()
        rows_T = (self.base_rows if pool_rows is None else pool_rows)[: positions.shape[-1]]
        hidden: Tensor | IntermediateTensors = self.model(
            input_ids, positions, rows_T, intermediate_tensors, inputs_embeds
        )
        steps.end()
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits, None on ranks above 0."""
        return self.logits_processor(self.lm_head, hidden_states)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the trunk, and experts that come with it; return the parameters loaded."""
        loaded = _TrunkWeights(self)
        for name, weight in self.slot_host.take_experts(weights):
            loaded.load(name, weight)
        # Counted now: vLLM's CPU linear layers repack their weights afterwards and drop these.
        self.slot_host.end_start_up(trunk_bytes=sum(p.nbytes for p in self.parameters()))
        return loaded.names


# -- decoder --


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "pool_rows": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class _EmoModel(nn.Module):
    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str, settings: PluginSettings, backend: MoeBackend
    ) -> None:
        super().__init__()
        config = emo_config(vllm_config)
        self.stage = Stage.of_this_rank(len(config.moe_layers))
        self.start_layer, self.end_layer = self.stage.layers.start, self.stage.layers.stop
        self.embed_tokens: nn.Module = PPMissingLayer()
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _DecoderLayer(vllm_config, moe, f"{prefix}.layers.{index}", settings, backend)
            if index in self.stage.layers
            else PPMissingLayer()
            for index, moe in enumerate(config.moe_layers)
        )
        self.norm: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        pool_rows: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        x_TD: Tensor
        residual_TD: Tensor | None
        if intermediate_tensors is not None:
            x_TD = intermediate_tensors["hidden_states"]
            residual_TD = intermediate_tensors["residual"]
        else:
            x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual_TD = None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_TD, residual_TD = layer(positions, x_TD, residual_TD, pool_rows)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TD, "residual": residual_TD})
        x_TD, _ = self.norm(x_TD, residual_TD)
        return x_TD


class _DecoderLayer(nn.Module):
    def __init__(
        self,
        vllm_config: VllmConfig,
        moe: MoeLayer | None,
        prefix: str,
        settings: PluginSettings,
        backend: MoeBackend,
    ) -> None:
        super().__init__()
        config = emo_config(vllm_config)
        self.pre_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(vllm_config, f"{prefix}.self_attn")
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: _DenseMlp | PooledMoE
        if moe is None:
            self.mlp = _DenseMlp(config, f"{prefix}.mlp")
        else:
            self.mlp = PooledMoE(config.facts, moe, settings, backend, f"{prefix}.mlp")

    def forward(
        self, positions: Tensor, x_TD: Tensor, residual_TD: Tensor | None, pool_rows_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            residual_TD = x_TD
            x_TD = self.pre_attention_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.pre_attention_layernorm(x_TD, residual_TD)
        x_TD = self.self_attn(positions, x_TD)
        x_TD, residual_TD = self.pre_feedforward_layernorm(x_TD, residual_TD)
        return self.mlp(x_TD, pool_rows_T), residual_TD


class _Attention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = emo_config(vllm_config)
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads, width = config.num_attention_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            width,
            heads,
            kv_heads,
            bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=config.attention_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            width,
            max_position=config.max_position_embeddings,
            rope_parameters=rope_for_vllm(config),
            is_neox_style=True,
        )
        local_heads, local_kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.widths = [local_heads * width, local_kv_heads * width, local_kv_heads * width]
        self.attn = Attention(
            local_heads,
            width,
            width**-0.5,
            num_kv_heads=local_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        y_TD, _ = self.o_proj(self.attn(q, k, v))
        return y_TD  # type: ignore[no-any-return]


class _DenseMlp(nn.Module):
    def __init__(self, config: EmoConfig, prefix: str) -> None:
        super().__init__()
        width, inner, bias = (
            config.hidden_size,
            config.dense_intermediate_size,
            config.dense_mlp_bias,
        )
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner, inner], bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, width, bias=bias, prefix=f"{prefix}.down_proj")
        self.activation = SiluAndMul()

    def forward(self, x_TD: Tensor, pool_rows_T: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x_TD)
        y_TD, _ = self.down_proj(self.activation(gate_up))
        return y_TD  # type: ignore[no-any-return]


# -- trunk --

_MERGED = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}
"""Tensors that vLLM's layers merge: part of the name -> the merged name, and the place in it."""


class _TrunkWeights:
    """Load tensors that are not experts, split and merged as vLLM's layers need them."""

    def __init__(self, model: EmoForCausalLM) -> None:
        self._model, self._parameters = model, dict(model.named_parameters())
        self.names: set[str] = set()

    def load(self, name: str, weight: Tensor) -> None:
        """Load one tensor of the checkpoint; raises CheckpointError if it has no place.

        Tensors of other stages are skipped, and so are buffers of other software: under plain
        `vllm serve`, vLLM's loader yields them.
        """
        if is_left_over(name) or is_pp_missing_parameter(name, self._model):
            return
        shard: tuple[Any, ...] = ()
        for part, (whole, shard_id) in _MERGED.items():
            if part in name:
                name, shard = name.replace(part, whole), (shard_id,)
        if name not in self._parameters:
            raise CheckpointError(f"tensor {name} has no place in an EMO model of this config")
        parameter = self._parameters[name]
        load: Callable[..., None] = getattr(parameter, "weight_loader", default_weight_loader)
        load(parameter, weight, *shard)
        self.names.add(name)
