"""The server's own settings, frozen and checked before anything heavy is imported.

Two kinds of refusal live here. `ServeSettings` holds the flags that are ours and raises ConfigError
for a value that makes no sense. `refuse_unsupported` looks at vLLM's flags, which otherwise pass
through untouched, and names those whose feature this design cannot carry yet, with the reason.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_serve.errors import ConfigError
from emo_serve.vllm_plugin import ADDITIONAL_CONFIG_KEY, LOAD_FORMAT, MOE_BACKENDS

__all__ = [
    "BASE_POOL",
    "GIB",
    "ServeSettings",
    "add_serve_flags",
    "expert_bytes",
    "format_gib",
    "parse_size",
    "refuse_unsupported",
    "slots_for_memory",
]

BASE_POOL = "base"
"""The name under which the base pool is asked for; no pool file may carry it."""

GIB = 2**30
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
_POOL_NAME = re.compile(r"[a-z0-9._-]{1,64}(\+[a-z0-9._-]{1,64})*")


# -- our flags --


@dataclass(frozen=True)
class ServeSettings:
    """What emo-serve adds to vLLM's flags.

    `model` is what the user named, a directory or a Hub id; None stands for the shipped demo. At
    most one of `expert_memory_bytes` (a device) and `expert_slots` (a layer) is set; with neither
    the slab holds all experts. `preload` None means every pool, in the catalog's order. Raises
    ConfigError.
    """

    model: str | None = None
    pools_dir: Path | None = None
    default_pool: str | None = None
    expert_memory_bytes: int | None = None
    expert_slots: int | None = None
    preload: tuple[str, ...] | None = None
    moe_backend: str = "auto"
    max_pools: int = 64
    drain_timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.expert_memory_bytes is not None and self.expert_slots is not None:
            raise ConfigError("--expert-memory and --expert-slots say the same thing; give one")
        if self.expert_slots is not None and self.expert_slots < 1:
            raise ConfigError(f"--expert-slots is {self.expert_slots}; a layer needs at least 1")
        if self.expert_memory_bytes is not None and self.expert_memory_bytes < 1:
            raise ConfigError(f"--expert-memory is {self.expert_memory_bytes} bytes; raise it")
        if self.pools_dir is not None and not self.pools_dir.is_dir():
            raise ConfigError(f"--pools {self.pools_dir} is not a directory")
        if self.moe_backend not in MOE_BACKENDS:
            known = ", ".join(MOE_BACKENDS)
            raise ConfigError(f"--moe-backend is {self.moe_backend!r}; one of {known} is served")
        if self.max_pools < 2:
            raise ConfigError(
                f"--max-pools is {self.max_pools}; the base pool takes one row, so at least 2"
            )
        if not (0 <= self.drain_timeout_seconds < math.inf):
            raise ConfigError(
                f"--drain-timeout is {self.drain_timeout_seconds}; give seconds, 0 or more"
            )
        if self.default_pool is not None:
            _check_pool_name("--default-pool", self.default_pool)
        for name in self.preload or ():
            _check_pool_name("--preload", name)
        if self.preload is not None and len(set(self.preload)) != len(self.preload):
            raise ConfigError(f"--preload {','.join(self.preload)} names a pool twice")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ServeSettings:
        """Build the settings from a namespace that `add_serve_flags` filled."""
        memory, preload = args.expert_memory, args.preload
        return cls(
            model=args.model_tag,
            pools_dir=None if args.pools is None else Path(args.pools),
            default_pool=args.default_pool,
            expert_memory_bytes=None if memory is None else parse_size("--expert-memory", memory),
            expert_slots=_parse_int("--expert-slots", args.expert_slots),
            preload=None if preload is None else tuple(filter(None, preload.split(","))),
            moe_backend=args.emo_moe_backend,
            max_pools=_parse_int("--max-pools", args.max_pools) or 0,
            drain_timeout_seconds=_parse_seconds("--drain-timeout", args.drain_timeout),
        )


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags of `emo-serve serve`; where vLLM has one of the same name, ours replaces it.

    The values stay text: ServeSettings reads them, so that a bad one is reported like any other.
    """
    group = parser.add_argument_group("emo-serve", "what emo-serve adds to `vllm serve`")
    group.add_argument("--pools", metavar="DIR", help="directory of pool files, one JSON a pool")
    group.add_argument(
        "--default-pool",
        metavar="NAME",
        help="pool of a request that names only the model; without it base, all experts",
    )
    group.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="device memory for experts, e.g. 8GiB; a device under tensor parallelism;"
        " without it all experts are held, and the base pool is served too",
    )
    group.add_argument(
        "--expert-slots", metavar="N", help="the same as a number of experts held a layer"
    )
    group.add_argument(
        "--preload",
        metavar="NAME,...",
        help="pools to make resident at start, in this order, as long as they fit;"
        " without it all, in order of name",
    )
    group.add_argument(
        "--moe-backend",
        dest="emo_moe_backend",
        metavar="|".join(MOE_BACKENDS),
        default="auto",
        help="expert maths: vLLM's CPU kernel, or plain torch anywhere; replaces vLLM's flag of"
        " this name, which EMO's layers do not read (default: %(default)s)",
    )
    group.add_argument(
        "--max-pools",
        metavar="N",
        default="64",
        help="rows of the pool table: pools and unions that can be in use at once"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        default="30",
        help="how long SIGTERM waits for running requests (default: %(default)s)",
    )


def _check_pool_name(flag: str, name: str) -> None:
    if not _POOL_NAME.fullmatch(name):
        raise ConfigError(
            f"{flag}: {name!r} cannot be a pool; names are 1 to 64 of a-z 0-9 . _ -,"
            " a union joins them with +"
        )


def _parse_int(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a whole number") from None


def _parse_seconds(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a number of seconds") from None


# -- sizes and slots --


def parse_size(flag: str, text: str) -> int:
    """Read "8GiB", "512 MiB" or plain bytes; ConfigError for anything else, GB and G included."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        binary = f"{unit[0]}iB" if unit in ("K", "M", "G", "T", "KB", "MB", "GB", "TB") else None
        remedy = f"write {match[1]}{binary}" if match and binary else "give e.g. 8GiB or 512MiB"
        raise ConfigError(f"{flag} is {text!r}; {remedy} (KiB, MiB, GiB, TiB or plain bytes)")
    return int(float(match[1]) * _UNITS[unit])


def format_gib(num_bytes: int) -> str:
    """Return a size in GiB, with figures enough to say something; very small ones in bytes."""
    gib = num_bytes / GIB
    if gib < 0.0001:
        return f"{num_bytes} bytes"
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib:.4f} GiB"


def expert_bytes(
    hidden_size: int, intermediate_size: int, dtype_bytes: int, tensor_parallel_size: int
) -> int:
    """Return what one slot takes on one device: gate, up and down of an expert's shard."""
    if intermediate_size % tensor_parallel_size:
        raise ConfigError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide"
            f" the experts' intermediate_size {intermediate_size}"
        )
    return 3 * hidden_size * (intermediate_size // tensor_parallel_size) * dtype_bytes


def slots_for_memory(budget_bytes: int, slot_bytes: int, experts_per_layer: Sequence[int]) -> int:
    """Return the largest number of slots a layer that fits the budget, at most all experts.

    `experts_per_layer` counts MoE layers only; a layer never has more slots than experts. Raises
    ConfigError when not even one slot a layer fits.
    """
    slots = 0
    for candidate in range(1, max(experts_per_layer) + 1):
        needed = sum(min(candidate, experts) for experts in experts_per_layer)
        if needed * slot_bytes > budget_bytes:
            break
        slots = candidate
    if slots == 0:
        raise ConfigError(
            f"--expert-memory {format_gib(budget_bytes)} holds no expert: one slot in each of"
            f" {len(experts_per_layer)} MoE layers takes"
            f" {format_gib(len(experts_per_layer) * slot_bytes)}; raise it"
        )
    return slots


# -- vLLM's flags we cannot carry --


@dataclass(frozen=True)
class _Unsupported:
    """One vLLM option, the values under which its feature is off, and why on is refused."""

    flag: str
    off: tuple[object, ...]
    reason: str

    def value(self, args: argparse.Namespace) -> object:
        return getattr(args, self.flag.removeprefix("--").replace("-", "_"), None)


_LORA = "LoRA adapters of experts would need slots of their own"
_DATA_PARALLEL = "each engine would need an expert slab and a pool table of its own"
_SPECULATIVE = "the draft model knows no pools"
_QUANTIZED = "slots hold bfloat16, float16 or float32 experts"
_OFFLOAD = "expert slots are the offloading; the trunk stays on the device"
_ONE_PROCESS = "leases are kept in one API-server process"
_OTHER_FRONT_END = "pools are resolved in this HTTP front end only"
_SPLIT_BATCH = "a batch split among devices or micro-batches loses its pool rows"
_KV_TRANSFER = "KV blocks from elsewhere do not say which pool computed them"
_NOT_GENERATION = "EMO models generate text; embedding and scoring heads are not served"
_OFF: tuple[object, ...] = (None, False, 0, "", [], {}, set())

_UNSUPPORTED: tuple[_Unsupported, ...] = (
    _Unsupported("--enable-lora", _OFF, _LORA),
    _Unsupported("--lora-modules", _OFF, _LORA),
    _Unsupported("--default-mm-loras", _OFF, _LORA),
    _Unsupported("--api-server-count", (None, 1), _ONE_PROCESS),
    _Unsupported("--headless", _OFF, _ONE_PROCESS),
    _Unsupported("--nnodes", (None, 1), "engines over several machines have not been tried"),
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
    _Unsupported("--enable-expert-parallel", _OFF, "each device holds a share of EVERY expert"),
    _Unsupported("--enable-eplb", _OFF, "emo-serve places experts itself"),
    _Unsupported("--pipeline-parallel-size", (None, 1), "pool rows reach the first stage only"),
    _Unsupported("--decode-context-parallel-size", (None, 1), _SPLIT_BATCH),
    _Unsupported("--prefill-context-parallel-size", (None, 1), _SPLIT_BATCH),
    _Unsupported("--enable-dbo", _OFF, _SPLIT_BATCH),
    _Unsupported("--ubatch-size", _OFF, _SPLIT_BATCH),
    _Unsupported("--speculative-config", _OFF, _SPECULATIVE),
    _Unsupported("--spec-method", _OFF, _SPECULATIVE),
    _Unsupported("--spec-model", _OFF, _SPECULATIVE),
    _Unsupported("--spec-tokens", _OFF, _SPECULATIVE),
    _Unsupported("--diffusion-config", _OFF, "EMO decodes one token at a time"),
    _Unsupported("--quantization", _OFF, _QUANTIZED),
    _Unsupported("--quantization-config", _OFF, _QUANTIZED),
    _Unsupported("--cpu-offload-gb", _OFF, _OFFLOAD),
    _Unsupported("--offload-group-size", _OFF, _OFFLOAD),
    _Unsupported("--enable-sleep-mode", _OFF, "waking up would not restore the expert slots"),
    _Unsupported("--weight-transfer-config", _OFF, "new weights would not reach the slots"),
    _Unsupported("--kv-transfer-config", _OFF, _KV_TRANSFER),
    _Unsupported("--enable-return-routed-experts", _OFF, "the layers do not record their choices"),
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

_UNSUPPORTED_VARIABLES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _LORA,
    "VLLM_USE_RUST_FRONTEND": _OTHER_FRONT_END,
}


def refuse_unsupported(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for the first vLLM option this server cannot honour.

    `args` is the namespace of vLLM's serve parser; `environ` defaults to this process's.
    """
    for option in _UNSUPPORTED:
        value = option.value(args)
        if value not in option.off:
            raise ConfigError(
                f"{option.flag} is {value!r}, which emo-serve does not serve yet:"
                f" {option.reason}; leave it out"
            )
    for variable, reason in _UNSUPPORTED_VARIABLES.items():
        if (os.environ if environ is None else environ).get(variable, "0").lower() in ("1", "true"):
            raise ConfigError(f"{variable} is set, which emo-serve does not serve yet: {reason}")
    additional = getattr(args, "additional_config", None) or {}
    if ADDITIONAL_CONFIG_KEY in additional:
        raise ConfigError(
            f"--additional-config: the key {ADDITIONAL_CONFIG_KEY!r} is emo-serve's own;"
            " use --expert-memory, --expert-slots, --max-pools and --moe-backend"
        )
