"""What the plugin reads from vLLM's configuration, and what it refuses there.

The front end refuses the same things earlier, in terms of its own flags. The checks here also hold
under plain `vllm serve`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig

from emo_serve.emo.config import EmoConfig
from emo_serve.errors import ConfigError
from emo_serve.facts import ModelFacts
from emo_serve.families.opening import facts_of_config
from emo_serve.vllm_plugin.backends import MoeBackend, choose_backend
from emo_serve.vllm_plugin.contract import ADDITIONAL_CONFIG_KEY, PluginSettings, expert_bytes
from emo_serve.vllm_plugin.streaming import SlotBackend

__all__ = [
    "backend_for",
    "emo_config",
    "has_front_end",
    "model_facts",
    "read_settings",
    "refuse_what_cannot_work",
    "rope_for_vllm",
]


def has_front_end(vllm_config: VllmConfig) -> bool:
    """Tell whether a front end will load experts; plain `vllm serve` has none."""
    return (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY) is not None


def read_settings(vllm_config: VllmConfig) -> PluginSettings:
    """Return what the front end decided; raises ConfigError for settings that cannot work.

    Without a front end there is a slot for every expert and one row, the base pool's, and routing
    is not recorded, because nothing would read the record.
    """
    if not has_front_end(vllm_config):
        most = max(model_facts(vllm_config).experts_per_layer)
        return PluginSettings(num_slots=max(1, most), num_pools=1, records_routing=False)
    settings = PluginSettings.from_config(vllm_config.additional_config)
    _check_host_bytes(settings.host_expert_bytes, settings.expert_dtype, vllm_config)
    return settings


def _check_host_bytes(host_expert_bytes: int, expert_dtype: str, vllm_config: VllmConfig) -> None:
    """Refuse host memory too small for one expert; 0 means no host memory."""
    facts, ranks = model_facts(vllm_config), vllm_config.parallel_config.tensor_parallel_size
    one_expert = expert_bytes(
        facts.hidden_size,
        facts.expert_width,
        expert_dtype,
        vllm_config.model_config.dtype.itemsize,
        ranks,
    )
    if host_expert_bytes < 0 or 0 < host_expert_bytes < one_expert:
        raise ConfigError(
            f"--host-expert-memory gives each device {host_expert_bytes} bytes; one expert takes"
            f" {one_expert} bytes; raise it, or leave it out to load from the files every time"
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


def model_facts(vllm_config: VllmConfig) -> ModelFacts:
    """Return what the plugin needs to know of the model; raises ConfigError."""
    return facts_of_config(vllm_config.model_config.hf_config)


def rope_for_vllm(config: EmoConfig) -> dict[str, Any]:
    """Return RoPE's parameters for vLLM; `dynamic` has no effect within the context length.

    A null means the same as no entry to transformers, and would be computed with by vLLM.
    """
    rope = {key: v for key, v in (config.rope_parameters or {}).items() if v is not None}
    if rope["rope_type"] == "dynamic":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope


def refuse_what_cannot_work(vllm_config: VllmConfig) -> None:
    """Raise ConfigError for vLLM options that this model does not support."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, width = parallel.tensor_parallel_size, model_facts(vllm_config).expert_width
    if parallel.pipeline_parallel_size > 1:
        _refuse_in_stages(vllm_config)
    if parallel.enable_expert_parallel:
        raise ConfigError(
            "--enable-expert-parallel: every device holds a part of each expert; leave it out"
        )
    if vllm_config.quant_config is not None:
        raise ConfigError(
            "--quantization does not work with pools; use --expert-dtype fp8_e4m3, which halves"
            " the experts"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError("--enable-lora: LoRA is not supported with pools; leave it out")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ConfigError(
            f"--speculative-config: method {speculative.method!r} needs a draft model, which has no"
            " pools; use ngram, or leave it out"
        )
    if width % ranks:
        raise ConfigError(
            f"--tensor-parallel-size {ranks} does not divide an expert's width, {width}"
        )
    config = vllm_config.model_config.hf_config
    context = config.max_position_embeddings
    is_dynamic = (config.rope_parameters or {}).get("rope_type") == "dynamic"
    if is_dynamic and model.max_model_len > context:
        raise ConfigError(
            f"--max-model-len {model.max_model_len} is over {context}: with dynamic RoPE scaling it"
            " must not exceed max_position_embeddings; lower it"
        )


def _refuse_in_stages(vllm_config: VllmConfig) -> None:
    """Raise ConfigError for what does not work with pipeline parallelism."""
    flag = f"--pipeline-parallel-size {vllm_config.parallel_config.pipeline_parallel_size}"
    if not isinstance(vllm_config.model_config.hf_config, EmoConfig):
        raise ConfigError(
            f"{flag}: only EMO models can be divided into stages; use --tensor-parallel-size"
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            f"{flag}: the first stage does not learn which drafted tokens were rejected; leave"
            " --speculative-config out"
        )


def backend_for(
    vllm_config: VllmConfig, settings: PluginSettings, device: torch.device
) -> MoeBackend:
    """Choose the expert maths for the workers' device; raises ConfigError if it cannot run."""
    facts = model_facts(vllm_config)
    width = facts.expert_width // vllm_config.parallel_config.tensor_parallel_size
    dtype = vllm_config.model_config.dtype
    backend = choose_backend(
        settings.moe_backend, device, facts.hidden_size, width, dtype, settings.expert_dtype
    )
    graphs = vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    if backend.name == "reference" and device.type == "cuda" and graphs:
        raise ConfigError(
            "--moe-backend reference synchronises with the host, which CUDA graphs cannot capture;"
            " add --enforce-eager"
        )
    if settings.stream_slots and not (device.type == "cpu" and isinstance(backend, SlotBackend)):
        raise ConfigError(
            f"--stream-slots {settings.stream_slots} works with --moe-backend cpu or reference on a"
            f" CPU; here {backend.name} runs on {device.type}; leave it out"
        )
    return backend
