"""The vLLM plugin: EMO as a vLLM model, and others with pools, inside vLLM's own processes.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it
starts, so `register` is idempotent and imports vLLM only when called. The front end uses the names
below and those of `contract`; vLLM reaches everything else through the strings it is given.
"""

from __future__ import annotations

from emo_serve.errors import ConfigError

__all__ = ["ARCHITECTURES", "SCHEDULER_CLS", "WORKER_EXTENSION_CLS", "register", "worker_cls_for"]

WORKER_EXTENSION_CLS = "emo_serve.vllm_plugin.worker.EmoWorkerExtension"
SCHEDULER_CLS = "emo_serve.vllm_plugin.scheduler.TurnScheduler"
"""For engines that stream: streamed requests and others in different steps."""
_WORKERS = {
    "cpu": "emo_serve.vllm_plugin.cpu_worker.EmoCpuWorker",
    "cuda": "emo_serve.vllm_plugin.gpu_worker.EmoGpuWorker",
}
_EMO = "emo_serve.vllm_plugin.model:EmoForCausalLM"
_STANDARD = "emo_serve.vllm_plugin.standard_models"
ARCHITECTURES = {
    "EmoForCausalLM": _EMO,
    "FlexOlmoNoQKNormPrenormForCausalLM": _EMO,
    "Olmo2NoQKNormPrenormForCausalLM": _EMO,
    "EmoServeOlmoeForCausalLM": f"{_STANDARD}:PooledOlmoe",
    "EmoServeQwen3MoeForCausalLM": f"{_STANDARD}:PooledQwen3Moe",
    "EmoServeMixtralForCausalLM": f"{_STANDARD}:PooledMixtral",
    "EmoServeFlexOlmoForCausalLM": f"{_STANDARD}:PooledFlexOlmo",
}
"""By architecture. Those of models that vLLM has are names of our own: see `standard_models`."""


def register() -> None:
    """Teach this process's vLLM the configs, the models and the load format `emo`.

    The processes of our own front end's engine are also made to end with it, and to wait for each
    other without burning a core.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from emo_serve.emo.config import EMO_CONFIGS
    from emo_serve.vllm_plugin.brief_spin import spin_briefly
    from emo_serve.vllm_plugin.loader import register_loader
    from emo_serve.vllm_plugin.orphans import end_with_parent

    end_with_parent()
    spin_briefly()
    for model_type, config in EMO_CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
    for architecture, path in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
    register_loader()


def worker_cls_for(device_type: str) -> str:
    """Return the worker class that gives vLLM's V1 model runner its pool rows.

    The V2 runner asks the model instead. Raises ConfigError for a device that has no such class.
    """
    if device_type not in _WORKERS:
        raise ConfigError(
            f"device {device_type!r} is not supported; use one of {', '.join(_WORKERS)}"
        )
    return _WORKERS[device_type]
