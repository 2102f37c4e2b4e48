"""The vLLM plugin: EMO as a vLLM model, inside vLLM's own processes.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it
starts, so it is idempotent and imports nothing heavy itself. The names below are all that the front
end uses of this package; the rest is reached by vLLM through the strings given to it.
"""

from __future__ import annotations

from emo_serve.errors import ConfigError

__all__ = [
    "ADDITIONAL_CONFIG_KEY",
    "LOAD_FORMAT",
    "MOE_BACKENDS",
    "POOL_ROW_ARG",
    "WORKER_EXTENSION_CLS",
    "register",
    "worker_cls_for",
]

ADDITIONAL_CONFIG_KEY = "emo_serve"
"""Key of EngineArgs.additional_config; its value holds the fields of settings.PluginSettings."""

LOAD_FORMAT = "emo"
"""Load format that reads the trunk only; experts come by worker calls."""

POOL_ROW_ARG = "emo_pool_row"
"""Key of SamplingParams.extra_args: the row of the pool table a request routes within."""

MOE_BACKENDS = ("auto", "triton", "cpu", "reference")
"""Expert maths: our CUDA kernels, vLLM's CPU kernel, or plain torch on any device."""

WORKER_EXTENSION_CLS = "emo_serve.vllm_plugin.worker.EmoWorkerExtension"
_WORKERS = {
    "cpu": "emo_serve.vllm_plugin.cpu_worker.EmoCpuWorker",
    "cuda": "emo_serve.vllm_plugin.gpu_worker.EmoGpuWorker",
}
_MODELS = {"EmoForCausalLM": "emo_serve.vllm_plugin.model:EmoForCausalLM"}


def register() -> None:
    """Teach this process's vLLM the config, the model and the load format `emo`."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from emo_serve.emo.config import EmoConfig
    from emo_serve.vllm_plugin.loader import register_loader

    AutoConfig.register("emo", EmoConfig, exist_ok=True)
    for architecture, path in _MODELS.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
    register_loader()


def worker_cls_for(device_type: str) -> str:
    """Return the worker class that gives vLLM's V1 model runner its pool rows.

    The V2 runner asks the model instead. Raises ConfigError for a device without one.
    """
    if device_type not in _WORKERS:
        raise ConfigError(f"device {device_type!r} is not served; one of {', '.join(_WORKERS)} is")
    return _WORKERS[device_type]
