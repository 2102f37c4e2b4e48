"""Reference EMO model in plain torch: trains the demo models and is the oracle of the tests.

Readability comes before speed, with one exception: `_GroupedExperts` runs forward and backward
expert by expert over rows sorted by expert, because it bounds training on a CPU. Whole sequences
only (no KV cache); serving is vLLM's job.

Parameter names are the checkpoint's, except that a layer's experts are stacked: `mlp.w13`
[E, 2F, D] (gate rows, then up rows) and `mlp.w2` [E, D, F]. `emo.checkpoint` translates.

Shapes: B documents, T tokens each, N = B*T, D hidden size, F expert width, E experts, K top-k,
R = N*K routed rows, V vocabulary, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from emo_serve.emo.config import EmoConfig
from emo_serve.emo.routing import route, standard_probabilities
from emo_serve.facts import MoeLayer

__all__ = [
    "DecoderLayer",
    "DenseMlp",
    "EmoForCausalLM",
    "EmoModel",
    "EmoMoe",
    "RouterRecord",
    "inverse_frequencies",
    "rotation",
]


@dataclass(frozen=True)
class RouterRecord:
    """What one MoE layer's router did; the tensors keep their gradients.

    `logits_BTE` are the gate's, before pool and temperature; `probabilities_BTS` the softmax inside
    the pool over the experts that are not shared; `experts_NK` the experts taken.
    """

    layer: int
    logits_BTE: Tensor
    probabilities_BTS: Tensor
    experts_NK: Tensor


class EmoForCausalLM(nn.Module):
    """Compute next-token logits for whole sequences."""

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = EmoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids_BT: Tensor,
        pool: Sequence[Tensor | None] | None = None,
        temperature: float = 1.0,
        record: list[RouterRecord] | None = None,
    ) -> Tensor:
        """Return logits_BTV.

        `pool` holds, per layer, a bool mask of the experts allowed ([E], or [B, E] for one pool per
        document; None allows all). `record` collects one RouterRecord per MoE layer.
        """
        return self.lm_head(self.model(ids_BT, pool, temperature, record))  # type: ignore[no-any-return]


class EmoModel(nn.Module):
    """Compute the final normalised hidden states."""

    inverse_frequencies: Tensor

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = enumerate(config.moe_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, moe, index) for index, moe in layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        frequencies, self.rope_scale = inverse_frequencies(config)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(
        self,
        ids_BT: Tensor,
        pool: Sequence[Tensor | None] | None = None,
        temperature: float = 1.0,
        record: list[RouterRecord] | None = None,
    ) -> Tensor:
        """Return hidden states [B, T, D]; arguments as EmoForCausalLM.forward."""
        x_BTD = self.embed_tokens(ids_BT)
        rope = rotation(self.inverse_frequencies, self.rope_scale, ids_BT.shape[1])
        for index, layer in enumerate(self.layers):
            pool_E = None if pool is None else pool[index]
            x_BTD = layer(x_BTD, rope, pool_E, temperature, record)
        return self.norm(x_BTD)  # type: ignore[no-any-return]


def inverse_frequencies(config: EmoConfig) -> tuple[Tensor, float]:
    """Return RoPE's inverse frequencies [C/2], fp32, and the factor on cos and sin.

    `dynamic` scaling changes nothing inside `max_position_embeddings`, which is as far as this
    model and the server go.
    """
    rope = config.rope_parameters or {}
    if rope["rope_type"] in ("default", "dynamic"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return rope["rope_theta"] ** -exponents, 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(scale)


def rotation(frequencies: Tensor, scale: float, length: int) -> tuple[Tensor, Tensor]:
    """Return RoPE's cos and sin [T, C] of the first `length` positions."""
    positions_T = torch.arange(length, device=frequencies.device, dtype=torch.float32)
    angles_TC = torch.outer(positions_T, frequencies).repeat(1, 2)
    return angles_TC.cos() * scale, angles_TC.sin() * scale


# -- layers --


class DecoderLayer(nn.Module):
    """One layer: attention, then a MoE or, where `moe` is None, a dense MLP."""

    def __init__(self, config: EmoConfig, moe: MoeLayer | None, index: int) -> None:
        super().__init__()
        self.pre_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DenseMlp(config) if moe is None else EmoMoe(config, moe, index)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        pool: Tensor | None,
        temperature: float,
        record: list[RouterRecord] | None,
    ) -> Tensor:
        """Return the layer's output [B, T, D]; `rope` is what `rotation` gives."""
        x_BTD = self.attend(x_BTD, rope)
        normed_BTD = self.pre_feedforward_layernorm(x_BTD)
        if isinstance(self.mlp, DenseMlp):
            return x_BTD + self.mlp(normed_BTD)  # type: ignore[no-any-return]
        return x_BTD + self.mlp(normed_BTD, pool, temperature, record)  # type: ignore[no-any-return]

    def attend(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return the residual stream after attention: what the layer's MLP or MoE reads."""
        return x_BTD + self.self_attn(self.pre_attention_layernorm(x_BTD), rope)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BHTC = _rotate(self.q_proj(x_BTD).view(heads).transpose(1, 2), rope)
        k_BHTC = _rotate(self.k_proj(x_BTD).view(heads).transpose(1, 2), rope)
        v_BHTC = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        grouped = q_BHTC.shape[1] != k_BHTC.shape[1]
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BHTC, v_BHTC, is_causal=True, enable_gqa=grouped
        )
        return self.o_proj(y_BHTC.transpose(1, 2).reshape(x_BTD.shape))  # type: ignore[no-any-return]


def _rotate(x_BHTC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos_TC, sin_TC = rope
    left, right = x_BHTC.float().chunk(2, -1)
    return (x_BHTC * cos_TC + torch.cat([-right, left], -1) * sin_TC).to(x_BHTC.dtype)


class DenseMlp(nn.Module):
    """The SwiGLU MLP of a layer without experts."""

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        assert config.dense_intermediate_size is not None, "EmoConfig checks this"
        width, inner = config.hidden_size, config.dense_intermediate_size
        bias = config.dense_mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to the last dimension."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class EmoMoe(nn.Module):
    """One MoE layer.

    `choose_pool` is EMO's training rule: in training mode it is called with the gate's fp32 logits
    [B, T, E] and returns the experts each document may use, bool [B, E].
    """

    def __init__(self, config: EmoConfig, moe: MoeLayer, index: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.moe, self.index = moe, index
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(width, moe.num_experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(moe.num_experts, 2 * inner, width))
        self.w2 = nn.Parameter(torch.empty(moe.num_experts, width, inner))
        self.choose_pool: Callable[[Tensor], Tensor] | None = None
        nn.init.normal_(self.w13, std=config.initializer_range)
        nn.init.normal_(self.w2, std=config.initializer_range)

    def forward(
        self,
        x_BTD: Tensor,
        pool: Tensor | None = None,
        temperature: float = 1.0,
        record: list[RouterRecord] | None = None,
    ) -> Tensor:
        """Return y_BTD; `pool` is a bool mask [E] or [B, E], None for all experts."""
        logits_BTE = self.gate(x_BTD).float()
        if self.training and self.choose_pool is not None:
            pool = self.choose_pool(logits_BTE.detach())
        num_documents, length, width = x_BTD.shape
        logits_NE = logits_BTE.flatten(0, 1)
        pool_NE = None if pool is None else pool.expand(num_documents, -1)
        if pool_NE is not None:
            pool_NE = pool_NE.repeat_interleave(length, 0)
        routing = route(logits_NE, self.moe, pool_NE, temperature, self.norm_topk_prob)
        if record is not None:
            probabilities_NS = standard_probabilities(logits_NE / temperature, self.moe, pool_NE)
            probabilities_BTS = probabilities_NS.view(num_documents, length, -1)
            record.append(
                RouterRecord(self.index, logits_BTE, probabilities_BTS, routing.experts_TK)
            )
        y_ND = _mix_experts(
            x_BTD.flatten(0, 1), routing.weights_TK, routing.experts_TK, self.w13, self.w2
        )
        return y_ND.view(num_documents, length, width)


# -- experts --


def _mix_experts(
    x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    experts_R = experts_NK.flatten()
    order_R = experts_R.argsort(stable=True)
    tokens_R = order_R // experts_NK.shape[1]
    counts = torch.bincount(experts_R, minlength=len(w13)).tolist()
    rows_RD = _GroupedExperts.apply(x_ND[tokens_R], w13, w2, counts)  # type: ignore[no-untyped-call]
    weights_R1 = weights_NK.flatten()[order_R, None].to(x_ND.dtype)
    return torch.zeros_like(x_ND).index_add(0, tokens_R, rows_RD * weights_R1)


class _GroupedExperts(torch.autograd.Function):
    """y[rows of e] = w2[e] @ (silu(gate) * up), [gate; up] = w13[e] @ x[rows of e]; rows sorted."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w13: Tensor, w2: Tensor, counts: list[int]) -> Tensor:
        inner = w2.shape[2]
        hidden_RF = x_RD.new_empty(len(x_RD), 2 * inner)
        y_RD = torch.empty_like(x_RD)
        groups = _groups(counts)
        for expert, rows in groups:
            torch.mm(x_RD[rows], w13[expert].t(), out=hidden_RF[rows])
        sigmoid_RF = torch.sigmoid(hidden_RF[:, :inner])
        silu_RF = sigmoid_RF * hidden_RF[:, :inner]
        active_RF = silu_RF * hidden_RF[:, inner:]
        for expert, rows in groups:
            torch.mm(active_RF[rows], w2[expert].t(), out=y_RD[rows])
        ctx.save_for_backward(x_RD, w13, w2, hidden_RF, sigmoid_RF, silu_RF, active_RF)
        ctx.groups = groups
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_RD, w13, w2, hidden_RF, sigmoid_RF, silu_RF, active_RF = ctx.saved_tensors
        inner = w2.shape[2]
        dy_RD = dy_RD.contiguous()
        dx_RD, dactive_RF = torch.empty_like(x_RD), torch.empty_like(active_RF)
        dhidden_RF = torch.empty_like(hidden_RF)
        dw13, dw2 = torch.zeros_like(w13), torch.zeros_like(w2)
        for expert, rows in ctx.groups:
            torch.mm(dy_RD[rows], w2[expert], out=dactive_RF[rows])
            torch.mm(dy_RD[rows].t(), active_RF[rows], out=dw2[expert])
        dhidden_RF[:, inner:] = dactive_RF * silu_RF
        dsilu_RF = sigmoid_RF + silu_RF * (1 - sigmoid_RF)
        dhidden_RF[:, :inner] = dactive_RF * hidden_RF[:, inner:] * dsilu_RF
        for expert, rows in ctx.groups:
            torch.mm(dhidden_RF[rows], w13[expert], out=dx_RD[rows])
            torch.mm(dhidden_RF[rows].t(), x_RD[rows], out=dw13[expert])
        return dx_RD, dw13, dw2, None


def _groups(counts: list[int]) -> list[tuple[int, slice]]:
    groups, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, slice(start, start + count)))
            start += count
    return groups
