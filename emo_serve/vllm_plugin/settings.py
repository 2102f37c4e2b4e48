"""What the plugin reads from vLLM's configuration, and what it refuses there.

The front end refuses the same things earlier and for its own flags; these checks also stand when
the model is served by plain `vllm serve`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig

from emo_serve.emo.config import EmoConfig
from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin import (
    ADDITIONAL_CONFIG_KEY,
    EXPERT_DTYPES,
    MOE_BACKENDS,
    expert_bytes,
)
from emo_serve.vllm_plugin.backends import MoeBackend, choose_backend

__all__ = [
    "PluginSettings",
    "backend_for",
    "emo_config",
    "refuse_what_cannot_work",
    "rope_for_vllm",
]


@dataclass(frozen=True)
class PluginSettings:
    """What the front end decided for the workers.

    `holds_all` is plain `vllm serve`: no front end, so every expert is loaded with the model and
    the base pool is published. `records_routing` is off there: nobody would read it.
    """

    num_slots: int
    num_pools: int
    moe_backend: str
    expert_dtype: str
    host_expert_bytes: int
    records_routing: bool
    holds_all: bool

    @classmethod
    def read(cls, vllm_config: VllmConfig) -> PluginSettings:
        """Read additional_config; raises ConfigError on unknown or missing keys and bad values."""
        given = (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
        if given is None:
            most = max(
                (moe.num_experts for moe in emo_config(vllm_config).moe_layers if moe), default=1
            )
            return cls(
                most,
                1,
                "auto",
                EXPERT_DTYPES[0],
                host_expert_bytes=0,
                records_routing=False,
                holds_all=True,
            )
        name = f"additional_config[{ADDITIONAL_CONFIG_KEY!r}]"
        expected = {field.name for field in fields(cls)} - {"holds_all"}
        if set(given) != expected:
            raise ConfigError(f"{name} has {sorted(given)}, expected {sorted(expected)}")
        for key, known in (("moe_backend", MOE_BACKENDS), ("expert_dtype", EXPERT_DTYPES)):
            if given[key] not in known:
                raise ConfigError(f"{name}: {key} is not one of {', '.join(known)}")
        if min(given["num_slots"], given["num_pools"]) < 1:
            raise ConfigError(f"{name} is {given}: num_slots and num_pools must be at least 1")
        _check_host_bytes(given["host_expert_bytes"], given["expert_dtype"], vllm_config)
        return cls(**given, holds_all=False)


def _check_host_bytes(host_expert_bytes: int, expert_dtype: str, vllm_config: VllmConfig) -> None:
    """Refuse host memory that holds no expert; 0 is none at all."""
    config, ranks = emo_config(vllm_config), vllm_config.parallel_config.tensor_parallel_size
    one_expert = expert_bytes(
        config.hidden_size,
        config.intermediate_size,
        expert_dtype,
        vllm_config.model_config.dtype.itemsize,
        ranks,
    )
    if host_expert_bytes < 0 or 0 < host_expert_bytes < one_expert:
        raise ConfigError(
            f"--host-expert-memory gives each device {host_expert_bytes} bytes; one expert takes"
            f" {one_expert} there; raise it, or leave it out to load from the files every time"
        )


def emo_config(vllm_config: VllmConfig) -> EmoConfig:
    """Return the model's config; raises ConfigError if another class was loaded for it."""
    config = vllm_config.model_config.hf_config
    if not isinstance(config, EmoConfig):
        raise ConfigError(
            f"the config was loaded as {type(config).__name__} from the checkpoint's own code;"
            " serve without --trust-remote-code"
        )
    return config


def rope_for_vllm(config: EmoConfig) -> dict[str, Any]:
    """Return RoPE's parameters for vLLM; `dynamic` changes nothing within the context length."""
    rope = dict(config.rope_parameters or {})
    if rope["rope_type"] == "dynamic":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope


def refuse_what_cannot_work(vllm_config: VllmConfig) -> None:
    """Raise ConfigError for what vLLM offers and this model cannot carry."""
    config = emo_config(vllm_config)
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, width = parallel.tensor_parallel_size, config.intermediate_size
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: slots are planned for all"
            " layers on every device; use --tensor-parallel-size"
        )
    if parallel.enable_expert_parallel:
        raise ConfigError("--enable-expert-parallel: every device holds a part of each expert")
    if vllm_config.quant_config is not None:
        raise ConfigError(
            "--quantization is not for EMO models; --expert-dtype fp8_e4m3 halves their experts"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError("--enable-lora: LoRA on EMO models is not supported")
    if vllm_config.speculative_config is not None:
        raise ConfigError("--speculative-config: drafted tokens carry no pool")
    if width % ranks:
        raise ConfigError(
            f"--tensor-parallel-size {ranks} does not divide intermediate_size {width}"
        )
    context = config.max_position_embeddings
    is_dynamic = (config.rope_parameters or {}).get("rope_type") == "dynamic"
    if is_dynamic and model.max_model_len > context:
        raise ConfigError(
            f"--max-model-len {model.max_model_len} is over {context}: dynamic RoPE scaling is"
            " served only within max_position_embeddings"
        )


def backend_for(
    vllm_config: VllmConfig, settings: PluginSettings, device: torch.device
) -> MoeBackend:
    """Choose the expert maths for the workers' device; raises ConfigError if it cannot run."""
    config = emo_config(vllm_config)
    width = config.intermediate_size // vllm_config.parallel_config.tensor_parallel_size
    dtype = vllm_config.model_config.dtype
    backend = choose_backend(
        settings.moe_backend, device, config.hidden_size, width, dtype, settings.expert_dtype
    )
    graphs = vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    if backend.name == "reference" and device.type == "cuda" and graphs:
        raise ConfigError(
            "--moe-backend reference synchronises with the host, which CUDA graphs cannot capture;"
            " add --enforce-eager"
        )
    return backend
