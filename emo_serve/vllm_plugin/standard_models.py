"""vLLM's own models with pools: each family's class with our experts in the `seam`.

They have names of their own and are built only where the config asks for them by that name, as
`emo-serve serve` does. Under their own names, vLLM's classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM

from emo_serve.checkpoints.weight_files import is_left_over
from emo_serve.errors import CheckpointError
from emo_serve.vllm_plugin.batch_pools import EmoModelState
from emo_serve.vllm_plugin.hosting import host_for
from emo_serve.vllm_plugin.seam import Seam
from emo_serve.vllm_plugin.settings import (
    backend_for,
    model_facts,
    read_settings,
    refuse_what_cannot_work,
)
from emo_serve.vllm_plugin.vocabulary import hold_once

__all__ = ["PooledFlexOlmo", "PooledMixtral", "PooledOlmoe", "PooledQwen3Moe"]

_Base: Any = nn.Module if TYPE_CHECKING else object


class _Pooled(_Base):
    """Mixed into a model of vLLM's: builds it over our experts, and owns what is in their slots."""

    pool_rows: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        facts, settings = model_facts(vllm_config), read_settings(vllm_config)
        refuse_what_cannot_work(vllm_config)
        backend = backend_for(vllm_config, settings, torch.get_default_device())
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        seam = Seam(facts, settings, backend, max_tokens)
        with seam.in_place():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        seam.check_complete()
        hold_once(self)
        self.register_buffer("pool_rows", seam.rows, persistent=False)
        layers = [seam.layers.get(index) for index in range(len(facts.moe_layers))]
        self.slot_host = host_for(vllm_config, layers, backend, seam.rows.device)

    @staticmethod
    def get_model_state_cls() -> type[EmoModelState]:
        """Tell vLLM's V2 runner how requests' pools reach the layers."""
        return EmoModelState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; outside of what vLLM compiles, which may be `forward` itself."""
        steps = self.slot_host.steps
        steps.begin()
        hidden = super().__call__(*args, **kwargs)
        steps.end()
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the trunk as vLLM's class does, and experts that come with it.

        Raises CheckpointError for a parameter that gets no weights.
        """
        trunk = (
            (name, weight)
            for name, weight in self.slot_host.take_experts(weights)
            if not is_left_over(name)
        )
        try:
            loaded: set[str] = set(super().load_weights(trunk))
        except (AttributeError, KeyError, ValueError) as error:  # vLLM's, for a name without place
            raise CheckpointError(f"the weights do not fit vLLM's model: {error}") from error
        self._check_loaded(loaded)
        self.slot_host.end_start_up(trunk_bytes=sum(p.nbytes for p in self.parameters()))
        return loaded

    def _check_loaded(self, loaded: set[str]) -> None:
        """Raise unless every parameter was loaded, under any of its names."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        missing = [each[0] for each in names.values() if not loaded.intersection(each)]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors of vLLM's model are not in the checkpoint, the first is"
                f" {min(missing)}"
            )


class PooledOlmoe(_Pooled, OlmoeForCausalLM):
    """OLMoE."""


class PooledQwen3Moe(_Pooled, Qwen3MoeForCausalLM):
    """Qwen3-MoE."""


class PooledMixtral(_Pooled, MixtralForCausalLM):
    """Mixtral, and what branch-train-mix makes of dense models."""


class PooledFlexOlmo(_Pooled, TransformersMoEForCausalLM):
    """FlexOlmo, through vLLM's transformers backend: vLLM has no class of its own for it."""
