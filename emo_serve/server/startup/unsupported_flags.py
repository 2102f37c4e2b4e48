"""Flags of vLLM that this server cannot support yet, each refused with the reason."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass

from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin.contract import ADDITIONAL_CONFIG_KEY, LOAD_FORMAT

__all__ = ["refuse_unsupported"]


@dataclass(frozen=True)
class _Unsupported:
    """One vLLM flag, the values that leave its feature off, and why the feature is refused."""

    flag: str
    off: tuple[object, ...]
    reason: str

    def value(self, args: argparse.Namespace) -> object:
        return getattr(args, self.flag.removeprefix("--").replace("-", "_"), None)


_LORA = (
    "a request names its pool where vLLM reads the name of an adapter, so it cannot name both, and"
    " adapters of experts would need slots of their own"
)
_DRAFT_MODEL = "a draft model, or a layer that drafts, has no pools"
_DATA_PARALLEL = "each engine would need its own expert slab and pool table"
_QUANTIZED = "only experts can be quantized, with --expert-dtype"
_OFFLOAD = "experts are offloaded by slots already, and the trunk stays on the device"
_ONE_PROCESS = "leases are kept in one API-server process"
_OTHER_FRONT_END = "pools are resolved in this HTTP front end only"
_SPLIT_BATCH = "pool rows do not follow a batch that is split over devices or micro-batches"
_KV_TRANSFER = (
    "KV blocks from another server do not say which pool computed them, and to host memory vLLM"
    " copies them from GPUs only"
)
_KV_OFFLOAD = (
    "vLLM copies KV blocks between a GPU and host memory only, so pools could not be tested with it"
    " on a CPU"
)
_SLEEP = (
    "waking up would not restore the expert slots, and on a CPU vLLM ignores it; to free the slots,"
    " evict all pools (POST /v1/pools/evict-all)"
)
_NOT_GENERATION = "EMO models generate text; embedding and scoring heads are not served"
_OFF: tuple[object, ...] = (None, False, 0, "", [], {}, set())

_UNSUPPORTED: tuple[_Unsupported, ...] = (
    _Unsupported("--enable-lora", _OFF, _LORA),
    _Unsupported("--lora-modules", _OFF, _LORA),
    _Unsupported("--default-mm-loras", _OFF, _LORA),
    _Unsupported("--api-server-count", (None, 1), _ONE_PROCESS),
    _Unsupported("--headless", _OFF, _ONE_PROCESS),
    _Unsupported("--nnodes", (None, 1), "engines on several machines have not been tried"),
    _Unsupported("--grpc", _OFF, _OTHER_FRONT_END),
    _Unsupported("--grpc-port", (None,), _OTHER_FRONT_END),
    _Unsupported("--data-parallel-size", (None, 1), _DATA_PARALLEL),
    _Unsupported("--data-parallel-size-local", (None, 1), _DATA_PARALLEL),
    _Unsupported("--data-parallel-rank", (None,), _DATA_PARALLEL),
    _Unsupported("--data-parallel-start-rank", (None,), _DATA_PARALLEL),
    _Unsupported("--data-parallel-hybrid-lb", _OFF, _DATA_PARALLEL),
    _Unsupported("--data-parallel-external-lb", _OFF, _DATA_PARALLEL),
    _Unsupported("--data-parallel-multi-port-external-lb", _OFF, _DATA_PARALLEL),
    _Unsupported("--enable-elastic-ep", _OFF, _DATA_PARALLEL),
    _Unsupported("--enable-expert-parallel", _OFF, "each device holds a part of every expert"),
    _Unsupported("--enable-eplb", _OFF, "emo-serve places experts itself"),
    _Unsupported("--decode-context-parallel-size", (None, 1), _SPLIT_BATCH),
    _Unsupported("--prefill-context-parallel-size", (None, 1), _SPLIT_BATCH),
    _Unsupported("--enable-dbo", _OFF, _SPLIT_BATCH),
    _Unsupported("--ubatch-size", _OFF, _SPLIT_BATCH),
    _Unsupported("--spec-model", _OFF, _DRAFT_MODEL),
    _Unsupported("--diffusion-config", _OFF, "EMO decodes one token at a time"),
    _Unsupported("--quantization", _OFF, _QUANTIZED),
    _Unsupported("--quantization-config", _OFF, _QUANTIZED),
    _Unsupported("--cpu-offload-gb", _OFF, _OFFLOAD),
    _Unsupported("--offload-group-size", _OFF, _OFFLOAD),
    _Unsupported("--enable-sleep-mode", _OFF, _SLEEP),
    _Unsupported("--weight-transfer-config", _OFF, "new weights would not reach the slots"),
    _Unsupported("--kv-transfer-config", _OFF, _KV_TRANSFER),
    _Unsupported("--kv-offloading-size", _OFF, _KV_OFFLOAD),
    _Unsupported(
        "--enable-return-routed-experts", _OFF, "the layers do not record which experts they chose"
    ),
    _Unsupported("--runner", (None, "auto", "generate"), _NOT_GENERATION),
    _Unsupported("--convert", (None, "auto", "none"), _NOT_GENERATION),
    _Unsupported("--pooler-config", _OFF, _NOT_GENERATION),
    _Unsupported("--model-impl", (None, "auto", "vllm"), "only emo-serve's own model has slots"),
    _Unsupported("--model-class-overrides", _OFF, "only emo-serve's own model has slots"),
    _Unsupported("--hf-config-path", _OFF, "the config is read from the model's directory"),
    _Unsupported("--load-format", (None, "auto", LOAD_FORMAT), "experts are read on demand"),
    _Unsupported("--worker-cls", (None, "auto"), "emo-serve brings its own worker"),
    _Unsupported("--worker-extension-cls", _OFF, "emo-serve brings its own worker extension"),
)

_DRAFTERS = {
    "ngram_gpu": "the V2 model runner drafts on the GPU for ngram, too",
    "suffix": "it needs a package that is not among the pinned ones, and the V1 model runner",
}
_NGRAM_KEYS = ("method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")

_UNSUPPORTED_VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _LORA,
    "VLLM_USE_RUST_FRONTEND": _OTHER_FRONT_END,
}


def refuse_unsupported(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for the first vLLM flag or variable that this server cannot support.

    `args` is the namespace of vLLM's serve parser; `environ` defaults to this process's.
    """
    for option in _UNSUPPORTED:
        value = option.value(args)
        if value not in option.off:
            raise ConfigError(
                f"{option.flag} is {value!r}, which emo-serve does not support yet:"
                f" {option.reason}; leave it out"
            )
    for variable, reason in _UNSUPPORTED_VARIABLES.items():
        if (os.environ if environ is None else environ).get(variable, "0").lower() in ("1", "true"):
            raise ConfigError(
                f"{variable} is set, which emo-serve does not support yet: {reason}; unset it"
            )
    _refuse_speculation(args)
    additional = getattr(args, "additional_config", None) or {}
    if ADDITIONAL_CONFIG_KEY in additional:
        raise ConfigError(
            f"--additional-config: the key {ADDITIONAL_CONFIG_KEY!r} belongs to emo-serve;"
            " use --expert-memory, --expert-slots, --max-pools and --moe-backend"
        )


def _refuse_speculation(args: argparse.Namespace) -> None:
    """Raise ConfigError for speculative decoding other than with the n-grams of the text itself."""
    config = getattr(args, "speculative_config", None) or {}
    given = {key.replace("-", "_"): value for key, value in config.items()}
    spec_method = getattr(args, "spec_method", None)
    method = given.get("method", spec_method)
    if (given or spec_method is not None) and method != "ngram":
        raise ConfigError(
            f"{'--speculative-config' if given else '--spec-method'}: the method is {method!r},"
            f" which emo-serve does not support yet: {_DRAFTERS.get(str(method), _DRAFT_MODEL)};"
            " use ngram, which drafts from the text itself, or leave the flag out"
        )
    if method is not None and (getattr(args, "pipeline_parallel_size", None) or 1) > 1:
        raise ConfigError(
            f"--pipeline-parallel-size is {args.pipeline_parallel_size}, which emo-serve does not"
            " support yet with speculative decoding: the first stage does not learn which drafted"
            " tokens were rejected; leave one of them out"
        )
    if unknown := sorted(given.keys() - set(_NGRAM_KEYS)):
        raise ConfigError(
            f"--speculative-config has {unknown[0]!r}, which emo-serve does not support yet: pools"
            f" were checked with {', '.join(_NGRAM_KEYS)} only; leave it out"
        )
