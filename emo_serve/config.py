"""The server's own settings, frozen and checked before anything heavy is imported.

`ServeSettings` holds the flags that are ours and raises ConfigError for a value that makes no
sense. vLLM's flags pass through untouched, but for those that server.unsupported_flags refuses.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_serve.errors import ConfigError
from emo_serve.residency.policy import POLICIES
from emo_serve.vllm_plugin import EXPERT_DTYPES, MOE_BACKENDS, check_expert_dtype

__all__ = [
    "AUTO_METHODS",
    "AUTO_POOL",
    "BASE_POOL",
    "GIB",
    "ServeSettings",
    "add_serve_flags",
    "format_gib",
    "parse_size",
    "slots_for_memory",
]

BASE_POOL = "base"
"""The name under which the base pool is asked for; no pool file may carry it."""

AUTO_POOL = "auto"
"""The name under which clients leave the choice of a pool to the server."""

AUTO_METHODS = ("tfidf", "router")
"""Who chooses for `auto`: a classifier of text, or the model's router."""

GIB = 2**30
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
_OPEN_PATHS = "/health,/ready,/ping,/version,/metrics"
_POOL_NAME = re.compile(r"[a-z0-9._-]{1,64}(\+[a-z0-9._-]{1,64})*")


# -- our flags --


@dataclass(frozen=True)
class ServeSettings:
    """What emo-serve adds to vLLM's flags.

    `model` is what the user named, a directory or a Hub id; None stands for the shipped demo. At
    most one of `expert_memory_bytes` (a device) and `expert_slots` (a layer) is set; with neither
    the slab holds all experts. `host_expert_bytes` is host memory a device, 0 for none. `preload`
    None means every pool, in the catalog's order; `auto_method` None, the classifier while all
    pools have examples, else the router. Raises ConfigError.
    """

    model: str | None = None
    pools_dir: Path | None = None
    default_pool: str | None = None
    expert_memory_bytes: int | None = None
    expert_slots: int | None = None
    host_expert_bytes: int = 0
    preload: tuple[str, ...] | None = None
    pin: tuple[str, ...] = ()
    eviction_policy: str = POLICIES[0]
    max_waiting: int = 256
    load_deadline_seconds: float = 60.0
    moe_backend: str = "auto"
    expert_dtype: str = EXPERT_DTYPES[0]
    max_pools: int = 64
    drain_timeout_seconds: float = 30.0
    admin_api_keys: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = tuple(_OPEN_PATHS.split(","))
    request_log: Path | None = None
    auto_method: str | None = None
    auto_examples: Path | None = None
    auto_tokens: int = 256
    auto_min_coverage: float = 0.4

    def __post_init__(self) -> None:
        self._check_memory()
        if self.pools_dir is not None and not self.pools_dir.is_dir():
            raise ConfigError(f"--pools {self.pools_dir} is not a directory")
        for flag, value, known in (
            ("--moe-backend", self.moe_backend, MOE_BACKENDS),
            ("--expert-dtype", self.expert_dtype, EXPERT_DTYPES),
            ("--eviction-policy", self.eviction_policy, POLICIES),
        ):
            if value not in known:
                raise ConfigError(f"{flag} is {value!r}; one of {', '.join(known)} is served")
        check_expert_dtype(self.expert_dtype, self.moe_backend)
        if self.max_pools < 2:
            raise ConfigError(
                f"--max-pools is {self.max_pools}; the base pool takes one row, so at least 2"
            )
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting is {self.max_waiting}; give 0 or more requests")
        if not (0 < self.load_deadline_seconds < math.inf):
            raise ConfigError(
                f"--load-deadline is {self.load_deadline_seconds}; give seconds, more than 0"
            )
        if not (0 <= self.drain_timeout_seconds < math.inf):
            raise ConfigError(
                f"--drain-timeout is {self.drain_timeout_seconds}; give seconds, 0 or more"
            )
        self._check_names()
        if not all(self.admin_api_keys):
            raise ConfigError("--admin-api-key is empty; give a key, or leave it out")
        for path in self.open_paths:
            if not path.startswith("/"):
                raise ConfigError(f"--open-paths: {path!r} is no path; write /metrics, for one")
        self._check_auto()

    def _check_memory(self) -> None:
        if self.expert_memory_bytes is not None and self.expert_slots is not None:
            raise ConfigError("--expert-memory and --expert-slots say the same thing; give one")
        if self.expert_slots is not None and self.expert_slots < 1:
            raise ConfigError(f"--expert-slots is {self.expert_slots}; a layer needs at least 1")
        if self.expert_memory_bytes is not None and self.expert_memory_bytes < 1:
            raise ConfigError(f"--expert-memory is {self.expert_memory_bytes} bytes; raise it")

    def _check_auto(self) -> None:
        if self.auto_method not in (None, *AUTO_METHODS):
            raise ConfigError(
                f"--auto-method is {self.auto_method!r}; one of {', '.join(AUTO_METHODS)} is served"
            )
        if self.auto_examples is not None and not self.auto_examples.is_dir():
            raise ConfigError(f"--auto-examples {self.auto_examples} is not a directory")
        if self.auto_tokens < 1:
            raise ConfigError(f"--auto-tokens is {self.auto_tokens}; give at least 1")
        if not (0 <= self.auto_min_coverage <= 1):
            raise ConfigError(
                f"--auto-min-coverage is {self.auto_min_coverage}; give a share from 0 to 1"
            )

    def _check_names(self) -> None:
        if self.default_pool is not None:
            _check_pool_name("--default-pool", self.default_pool)
        for flag, names in (("--preload", self.preload or ()), ("--pin", self.pin)):
            for name in names:
                _check_pool_name(flag, name)
            if len(set(names)) != len(names):
                raise ConfigError(f"{flag} {','.join(names)} names a pool twice")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ServeSettings:
        """Build the settings from a namespace that `add_serve_flags` filled."""
        memory, host, preload = args.expert_memory, args.host_expert_memory, args.preload
        return cls(
            model=args.model_tag,
            pools_dir=None if args.pools is None else Path(args.pools),
            default_pool=args.default_pool,
            expert_memory_bytes=None if memory is None else parse_size("--expert-memory", memory),
            expert_slots=_parse_int("--expert-slots", args.expert_slots),
            host_expert_bytes=0 if host is None else parse_size("--host-expert-memory", host),
            preload=None if preload is None else _split(preload),
            pin=_split(args.pin),
            eviction_policy=args.eviction_policy,
            max_waiting=_parse_int("--max-waiting", args.max_waiting) or 0,
            load_deadline_seconds=_parse_seconds("--load-deadline", args.load_deadline),
            moe_backend=args.emo_moe_backend,
            expert_dtype=args.expert_dtype,
            max_pools=_parse_int("--max-pools", args.max_pools) or 0,
            drain_timeout_seconds=_parse_seconds("--drain-timeout", args.drain_timeout),
            admin_api_keys=tuple(args.admin_api_key or ()),
            open_paths=_split(args.open_paths),
            request_log=None if args.request_log is None else Path(args.request_log),
            auto_method=args.auto_method,
            auto_examples=None if args.auto_examples is None else Path(args.auto_examples),
            auto_tokens=_parse_int("--auto-tokens", args.auto_tokens) or 0,
            auto_min_coverage=_parse_share("--auto-min-coverage", args.auto_min_coverage),
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
        "--pin",
        metavar="NAME,...",
        default="",
        help="pools to make resident before all others, and never to evict until unpinned",
    )
    group.add_argument(
        "--host-expert-memory",
        metavar="SIZE",
        help="host memory a device in which experts read once are kept ready to copy"
        " (default: none, they are read from the checkpoint's files)",
    )
    group.add_argument(
        "--eviction-policy",
        metavar="|".join(POLICIES),
        default=POLICIES[0],
        help="which pool goes when another needs its slots: the one asked for least often of late,"
        " the one asked for least recently, or one that --preload does not name"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--max-waiting",
        metavar="N",
        default="256",
        help="requests that may wait for a pool to be loaded; more get 503 (default: %(default)s)",
    )
    group.add_argument(
        "--load-deadline",
        metavar="SECONDS",
        default="60",
        help="how long a request waits for its pool before it gets 503 (default: %(default)s)",
    )
    group.add_argument(
        "--moe-backend",
        dest="emo_moe_backend",
        metavar="|".join(MOE_BACKENDS),
        default="auto",
        help="expert maths: our kernels for CUDA, vLLM's CPU kernel, or plain torch anywhere; auto"
        " is the fastest that can run; replaces vLLM's flag of this name, which EMO's layers do not"
        " read (default: %(default)s)",
    )
    group.add_argument(
        "--expert-dtype",
        metavar="|".join(EXPERT_DTYPES),
        default=EXPERT_DTYPES[0],
        help="experts in their slots: auto is --dtype; fp8_e4m3, with a scale an output channel,"
        " takes half the memory of 16 bits and needs --moe-backend triton (default: %(default)s)",
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
    group.add_argument(
        "--admin-api-key",
        metavar="KEY",
        action="append",
        help="key that may add, remove, load, evict and pin pools, and opens all that --api-key"
        " does; may be given several times. Without it --api-key may, and without either anybody",
    )
    group.add_argument(
        "--open-paths",
        metavar="PATH,...",
        default=_OPEN_PATHS,
        help="what answers without a key when --api-key is set (default: %(default)s)",
    )
    group.add_argument(
        "--request-log",
        metavar="FILE",
        help="append one JSON line a request: pool, waiting, seconds, tokens; no text",
    )
    _add_auto_flags(group)


def _add_auto_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--auto-method",
        metavar="|".join(AUTO_METHODS),
        help=f"who chooses the pool of model {AUTO_POOL!r}: a classifier that learns from examples,"
        " or the model's router, which needs none and a step of the engine (default: the classifier"
        " while all pools have examples, else the router)",
    )
    group.add_argument(
        "--auto-examples",
        metavar="DIR",
        help="what the classifier learns from: NAME.jsonl or NAME.txt, texts of that pool's domain",
    )
    group.add_argument(
        "--auto-tokens",
        metavar="N",
        default="256",
        help="first tokens of a prompt that are looked at (default: %(default)s)",
    )
    group.add_argument(
        "--auto-min-coverage",
        metavar="SHARE",
        default="0.4",
        help="share of the router's mass that the best pool must cover, else the base pool is"
        " chosen, where it is resident; for the router alone (default: %(default)s)",
    )


def _check_pool_name(flag: str, name: str) -> None:
    if not _POOL_NAME.fullmatch(name):
        raise ConfigError(
            f"{flag}: {name!r} cannot be a pool; names are 1 to 64 of a-z 0-9 . _ -,"
            " a union joins them with +"
        )


def _split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


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


def _parse_share(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give a number from 0 to 1") from None


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
