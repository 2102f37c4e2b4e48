"""The vLLM plugin: EMO as a vLLM model, inside vLLM's own processes.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it
starts, so it is idempotent and imports nothing heavy itself. The names below are all that the front
end uses of this package; the rest is reached by vLLM through the strings given to it.
"""

from __future__ import annotations

import os

from emo_serve.errors import ConfigError

__all__ = [
    "ACCOUNT_ARG",
    "ADDITIONAL_CONFIG_KEY",
    "EXPERT_DTYPES",
    "LOAD_FORMAT",
    "MASS_SLOTS",
    "MASS_SLOT_ARG",
    "MOE_BACKENDS",
    "NO_ACCOUNT",
    "NO_MASS_SLOT",
    "POOL_ROW_ARG",
    "WORKER_EXTENSION_CLS",
    "check_expert_dtype",
    "check_moe_backend",
    "device_obstacle",
    "expert_bytes",
    "register",
    "worker_cls_for",
]

ADDITIONAL_CONFIG_KEY = "emo_serve"
"""Key of EngineArgs.additional_config; its value holds the fields of settings.PluginSettings."""

LOAD_FORMAT = "emo"
"""Load format that reads the trunk only; experts come by worker calls."""

POOL_ROW_ARG = "emo_pool_row"
"""Key of SamplingParams.extra_args: the row of the pool table a request routes within."""

ACCOUNT_ARG = "emo_account"
"""Likewise: the number, from 1, under which the request's coverage is summed up."""

MASS_SLOT_ARG = "emo_mass_slot"
"""Likewise: which of MASS_SLOTS sums the router's mass of each expert is added to."""

MASS_SLOTS = 16
NO_ACCOUNT = 0
NO_MASS_SLOT = -1

MOE_BACKENDS = ("auto", "triton", "cpu", "reference")
"""Expert maths: our CUDA kernels, vLLM's CPU kernel, or plain torch on any device."""

EXPERT_DTYPES = ("auto", "fp8_e4m3")
"""Expert weights in their slots: the activations' dtype, or fp8 with a scale an output channel."""

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


def device_obstacle(moe_backend: str, device_type: str) -> str | None:
    """Return why no device of this kind can run a backend; None where one may."""
    if moe_backend == "cpu" and device_type != "cpu":
        return f"--moe-backend cpu needs a CPU; the device is {device_type}"
    if moe_backend == "triton" and device_type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return (
            "--moe-backend triton needs a CUDA device; on a CPU it runs, very slowly, with"
            " TRITON_INTERPRET=1 in the environment"
        )
    return None


def check_moe_backend(moe_backend: str, device_type: str) -> None:
    """Raise ConfigError where the device can be told in advance not to run the backend."""
    obstacle = device_obstacle(moe_backend, device_type)
    if obstacle is not None:
        raise ConfigError(f"{obstacle}; use --moe-backend reference")


def check_expert_dtype(expert_dtype: str, moe_backend: str, device_type: str | None = None) -> None:
    """Raise ConfigError for fp8 experts where our kernels do not run; None stands for any device.

    What only the device knows, such as its compute capability, is checked in the workers.
    """
    if expert_dtype == EXPERT_DTYPES[0]:
        return
    # auto takes our kernels on CUDA alone: the interpreter is for who asks for it.
    wants_them = moe_backend == "triton" or (
        moe_backend == "auto" and device_type in (None, "cuda")
    )
    obstacle = None if device_type is None else device_obstacle("triton", device_type)
    if not wants_them or obstacle is not None:
        where = "" if device_type is None else f" and the device is {device_type}"
        raise ConfigError(
            f"--expert-dtype {expert_dtype} needs --moe-backend triton on a CUDA device;"
            f" --moe-backend is {moe_backend}{where}; leave --expert-dtype out"
        )


def expert_bytes(
    hidden_size: int,
    intermediate_size: int,
    expert_dtype: str,
    dtype_bytes: int,
    tensor_parallel_size: int = 1,
) -> int:
    """Return what one slot takes on one device: gate, up and down of an expert's part, and scales.

    `dtype_bytes` are those of an activation. Raises ConfigError for a part that is no whole number.
    """
    width, rest = divmod(intermediate_size, tensor_parallel_size)
    if rest:
        raise ConfigError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide"
            f" the experts' intermediate_size {intermediate_size}"
        )
    weights = 3 * hidden_size * width
    if expert_dtype == EXPERT_DTYPES[0]:
        return weights * dtype_bytes
    return weights + 4 * (2 * width + hidden_size)  # fp32, a row of w13 [2F, D] and of w2 [D, F]
