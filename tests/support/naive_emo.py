"""A third implementation of EMO, independent of ours: numpy, float64, one token at a time.

Written from the mathematics alone (see emo_serve.emo.routing for its source), slow on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.golden.checkpoints import always_of, config_of, experts_of, rounded_weights_of


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def choose(
    logits: np.ndarray,
    pool: set[int],
    num_shared: int,
    always: Sequence[int],
    k: int,
    renormalise: bool,
    temperature: float = 1.0,
) -> dict[int, float]:
    """Return {expert: weight} for one token."""
    logits = logits / temperature
    num_experts = len(logits)
    shared = list(range(num_experts - num_shared, num_experts))
    if always:
        members = sorted(pool | set(shared) | set(always))
        share = dict(zip(members, softmax(logits[members]), strict=True))
        others = sorted((e for e in members if e not in always), key=lambda e: (-share[e], e))
        return {e: share[e] for e in [*always, *others[: k - len(always)]]}
    members = sorted(pool - set(shared))
    taken: dict[int, float] = {}
    if members:
        share = dict(zip(members, softmax(logits[members]), strict=True))
        best = sorted(members, key=lambda e: (-share[e], e))[: k - num_shared]
        total = sum(share[e] for e in best) if renormalise else 1.0
        taken = {e: share[e] / total for e in best}
    if shared:
        taken.update(zip(shared, softmax(logits[shared]), strict=True))
    return taken


class NaiveEmo:
    """Log-probabilities of a golden case under a pool."""

    def __init__(self, case: str) -> None:
        self.config = config_of(case)
        self.weights = rounded_weights_of(case)
        self.experts, self.shared = experts_of(self.config)

    def prompt_logprobs(
        self, ids: Sequence[int], pool: list[list[int]] | None = None, temperature: float = 1.0
    ) -> np.ndarray:
        """Return the log-probability of ids[1:], each given what stands before it."""
        x = self.weights["model.embed_tokens.weight"][list(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(prefix, self._norm(prefix + "pre_attention_layernorm", x))
            normed = self._norm(prefix + "pre_feedforward_layernorm", x)
            kept = set(range(self.experts[layer])) if pool is None else set(pool[layer])
            x = x + np.stack([self._mlp(layer, row, kept, temperature) for row in normed])
        logits = self._norm("model.norm", x) @ self.weights["lm_head.weight"].T
        rows = [np.log(softmax(row)) for row in logits[:-1]]
        return np.array([row[token] for row, token in zip(rows, ids[1:], strict=True)])

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name + ".weight"]

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)

    def _attention(self, prefix: str, x: np.ndarray) -> np.ndarray:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["hidden_size"] // heads
        names = ("q", "k", "v")
        q, k, v = (self._linear(f"{prefix}self_attn.{name}_proj", x) for name in names)
        out = np.zeros_like(q)
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            kv = head // (heads // kv_heads)
            theirs = slice(kv * width, (kv + 1) * width)
            for t in range(len(x)):
                query = rotate(q[t, mine], t, self.config)
                keys = np.stack([rotate(k[s, theirs], s, self.config) for s in range(t + 1)])
                out[t, mine] = softmax(keys @ query / np.sqrt(width)) @ v[: t + 1, theirs]
        return self._linear(f"{prefix}self_attn.o_proj", out)

    def _mlp(self, layer: int, row: np.ndarray, pool: set[int], temperature: float) -> np.ndarray:
        prefix = f"model.layers.{layer}.mlp."
        if self.experts[layer] == 0:
            return self._swiglu(prefix, row)
        k = min(self.config["num_experts_per_tok"], self.experts[layer])
        taken = choose(
            self._linear(prefix + "gate", row),
            pool,
            self.shared[layer],
            always_of(self.config, layer),
            k,
            self.config["norm_topk_prob"],
            temperature,
        )
        return sum(w * self._swiglu(f"{prefix}experts.{e}.", row) for e, w in taken.items())

    def _swiglu(self, prefix: str, row: np.ndarray) -> np.ndarray:
        gate, up = self._linear(prefix + "gate_proj", row), self._linear(prefix + "up_proj", row)
        return self._linear(prefix + "down_proj", gate / (1 + np.exp(-gate)) * up)


def rotate(vector: np.ndarray, position: int, config: dict[str, Any]) -> np.ndarray:
    """Apply RoPE to one head; knows the plain and the linearly scaled kind only."""
    scaling = config["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    assert kind in ("default", "linear", "dynamic"), kind
    if kind == "linear":
        position = position / scaling["factor"]
    half = len(vector) // 2
    angles = position * config["rope_theta"] ** -(np.arange(half) / half)
    left, right = vector[:half], vector[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin])
