"""The slot host of a model that vLLM builds, as vLLM's configuration says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.moe import PooledExperts
from emo_serve.vllm_plugin.packed import ExpertShape
from emo_serve.vllm_plugin.settings import has_front_end, model_facts, read_settings
from emo_serve.vllm_plugin.slot_host import SlotHost
from emo_serve.vllm_plugin.stage import Stage

__all__ = ["host_for"]


def host_for(
    vllm_config: VllmConfig,
    layers: Sequence[PooledExperts | None],
    backend: MoeBackend,
    device: torch.device,
    stage: Stage | None = None,
) -> SlotHost:
    """Return the host of this rank's slots; `layers` has None for a dense one.

    Without a `stage`, the rank computes all layers.
    """
    facts = model_facts(vllm_config)
    width = facts.expert_width // get_tensor_model_parallel_world_size()
    shape = ExpertShape(
        facts.hidden_size,
        max(1, width),  # a dense model has no experts, but memory is divided by an expert's size
        backend.slab_dtype(vllm_config.model_config.dtype),
        get_tensor_model_parallel_rank(),
    )
    return SlotHost(
        layers,
        backend,
        shape,
        read_settings(vllm_config),
        device,
        names=facts.names,
        holds_all=not has_front_end(vllm_config),
        max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        stage=stage,
    )
