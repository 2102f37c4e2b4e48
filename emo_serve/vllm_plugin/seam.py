"""Our experts inside vLLM's own models: in the two classes that vLLM lets others replace.

Every MoE model of vLLM builds its layers by one factory, from `RoutedExperts`, which holds the
weights, and `MoERunner`, which computes. Both are looked up by name as they are constructed. While
one of our models is built, and only then, the names stand for the classes here: no experts, and a
runner over `PooledExperts`. Attention, norms and gates stay vLLM's.

vLLM's models take no pool rows, so a runner reads them from a buffer that never moves and that all
runners of a model share.

Upstream: vllm 0.32.0, model_executor/custom_op.py (PluggableLayer), layers/fused_moe/layer.py
(FusedMoEFactory), routed_experts.py and runner/moe_runner.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.transformers.moe import TransformersRoutedExperts

from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts
from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.contract import BASE_POOL_ROW, PluginSettings
from emo_serve.vllm_plugin.moe import PooledExperts

__all__ = ["NoExperts", "NoTransformersExperts", "PooledRunner", "Seam"]

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*")


class Seam:
    """Build the experts of one model, layer by layer, as vLLM constructs it.

    `rows` is the buffer that all runners read: one pool row per token, the base pool's at first.
    """

    def __init__(
        self, facts: ModelFacts, settings: PluginSettings, backend: MoeBackend, max_num_tokens: int
    ) -> None:
        self.rows = torch.full((max_num_tokens,), BASE_POOL_ROW)
        self.layers: dict[int, PooledExperts] = {}
        self._facts, self._settings, self._backend = facts, settings, backend

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have vLLM's factory build our classes until the exit; whatever stood there comes back."""
        runner = type("PooledRunner", (PooledRunner,), {"seam": self})
        ours = {
            "MoERunner": runner,
            "RoutedExperts": NoExperts,
            "TransformersRoutedExperts": NoTransformersExperts,
        }
        before = dict(op_registry_oot)
        op_registry_oot.update(ours)
        try:
            yield
        finally:
            op_registry_oot.clear()
            op_registry_oot.update(before)

    def build(self, name: str) -> PooledExperts:
        """Return the experts of the layer that vLLM calls `name`; raises ConfigError."""
        match = _LAYER.fullmatch(name)
        layers = self._facts.moe_layers
        index = int(match[1]) if match else -1
        moe = layers[index] if 0 <= index < len(layers) else None
        if moe is None or index in self.layers:
            raise ConfigError(
                f"vLLM builds experts as {name}, where a {self._facts.family} of this config has"
                " none, or has some already"
            )
        self.layers[index] = PooledExperts(self._facts, moe, self._settings, self._backend, name)
        return self.layers[index]

    def check_complete(self) -> None:
        """Raise ConfigError unless every layer with experts became ours."""
        wanted = {index for index, moe in enumerate(self._facts.moe_layers) if moe is not None}
        if missing := sorted(wanted - set(self.layers)):
            raise ConfigError(
                f"vLLM's model computes the experts of layers {missing} by itself, not through its"
                " MoE runner; pools cannot be served there"
            )


class NoExperts(RoutedExperts):
    """What the factory was told about a layer's experts; holds no weights."""

    def __init__(
        self,
        layer_name: str,
        params_dtype: torch.dtype,
        moe_config: Any,
        quant_config: Any,
        **settings: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.settings = {**settings, "quant_config": quant_config}


class NoTransformersExperts(TransformersRoutedExperts):
    """The same under vLLM's transformers backend."""

    __init__ = NoExperts.__init__


class PooledRunner(MoERunner):
    """Compute a layer's experts inside each token's pool; `seam` is that of the model being built.

    Raises ConfigError for a layer that routes or computes as `PooledExperts` cannot.
    """

    seam: Seam
    pool_rows: Tensor

    def __init__(
        self,
        layer_name: str,
        moe_config: Any,
        router: Any,
        routed_experts: RoutedExperts,
        enable_dbo: bool = False,
        gate: nn.Module | None = None,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
        routed_input_transform: nn.Module | None = None,
        routed_output_transform: nn.Module | None = None,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        self._already_called_process_weights_after_loading = True  # there are none
        self.layer_name, self.moe_config, self.gate = layer_name, moe_config, gate
        self.routed_experts, self._shared_experts = routed_experts, None
        settings = getattr(routed_experts, "settings", {})
        _refuse_other_maths(
            layer_name,
            {
                **settings,
                "shared_experts": shared_experts,
                "shared_expert_gate": shared_expert_gate,
                "routed_input_transform": routed_input_transform,
                "routed_output_transform": routed_output_transform,
                "has_bias": moe_config.has_bias,
                "activation": moe_config.activation.value,
            },
            (settings.get("routed_scaling_factor", 1.0), routed_scaling_factor),
        )
        self.pooled = self.seam.build(layer_name)
        self.register_buffer("pool_rows", self.seam.rows, persistent=False)

    @property
    def _quant_method(self) -> Any:
        return _NotQuantised()

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        input_ids: Tensor | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Return y_TD; with a gate of its own, the layer computes the logits here."""
        logits_TE = router_logits if self.gate is None else self.gate(hidden_states)[0]
        rows_T = self.pool_rows[: logits_TE.shape[0]]
        return self.pooled.mix(hidden_states, logits_TE, rows_T)


class _NotQuantised:
    """What vLLM's warm-up of quantised kernels asks of a layer's method."""

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None


_PLAIN: dict[str, tuple[object, ...]] = {
    "scoring_func": ("softmax",),
    "e_score_correction_bias": (None,),
    "use_grouped_topk": (False,),
    "custom_routing_function": (None,),
    "apply_router_weight_on_input": (False,),
    "swiglu_limit": (None,),
    "swiglu_alpha": (None,),
    "swiglu_beta": (None,),
    "quant_config": (None,),
    "shared_experts": (None,),
    "shared_expert_gate": (None,),
    "routed_input_transform": (None,),
    "routed_output_transform": (None,),
    "has_bias": (False,),
    "activation": ("silu",),
}
"""What the factory is told of a layer -> the values that `PooledExperts` computes."""


def _refuse_other_maths(
    layer_name: str, settings: dict[str, Any], scales: tuple[float, ...]
) -> None:
    for name, served in _PLAIN.items():
        value = settings.get(name, served[0])
        if not any(value is each or (isinstance(value, str) and value == each) for each in served):
            shown = type(value).__name__ if isinstance(value, nn.Module | Tensor) else repr(value)
            raise ConfigError(
                f"{layer_name}: vLLM's model has {name} {shown}, which pools cannot be served with;"
                f" expected {served[0]!r}"
            )
    if any(scale != 1.0 for scale in scales):
        raise ConfigError(f"{layer_name}: routed_scaling_factor {scales}: expected 1")
