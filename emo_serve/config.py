"""The server's own settings: each flag with its default, its help and its reader, in one place.

`ServeSettings` is frozen and checks itself before anything heavy is imported; an invalid value
raises ConfigError. The flags of `emo-serve serve` are made from its fields. vLLM's flags pass
through unchanged, except those that server.startup.unsupported_flags refuses.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from emo_serve.errors import ConfigError
from emo_serve.flags import (
    flag,
    flags_of,
    read_int,
    read_list,
    read_path,
    read_range,
    read_seconds,
    read_share,
    read_switch,
    read_text,
)
from emo_serve.names import AUTO_POOL, REQUEST_RULE, is_pool_or_union
from emo_serve.residency.policy import POLICIES
from emo_serve.vllm_plugin.contract import EXPERT_DTYPES, MOE_BACKENDS, check_expert_dtype

__all__ = [
    "AUTO_METHODS",
    "GIB",
    "PATH_FLAGS",
    "ServeSettings",
    "add_serve_flags",
    "format_gib",
    "parse_size",
    "slots_for_memory",
]

AUTO_METHODS = ("tfidf", "router")
"""Ways to choose a pool for `auto`: a text classifier, or the model's router."""

GIB = 2**30
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
_OPEN_PATHS = ("/health", "/ready", "/ping", "/version", "/metrics", "/metrics/routing")


# -- sizes --


def parse_size(flag: str, text: str) -> int:
    """Return the bytes of "8GiB", "512 MiB" or a plain number.

    Raises ConfigError for anything else, including GB and G.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        binary = f"{unit[0]}iB" if unit in ("K", "M", "G", "T", "KB", "MB", "GB", "TB") else None
        remedy = f"write {match[1]}{binary}" if match and binary else "give e.g. 8GiB or 512MiB"
        raise ConfigError(f"{flag} is {text!r}; {remedy} (KiB, MiB, GiB, TiB or plain bytes)")
    return int(float(match[1]) * _UNITS[unit])


def format_gib(num_bytes: int) -> str:
    """Return a size as text in GiB with enough digits to be useful, below 0.0001 GiB in bytes."""
    gib = num_bytes / GIB
    if gib < 0.0001:
        return f"{num_bytes} bytes"
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib:.4f} GiB"


# -- settings --


@dataclass(frozen=True)
class ServeSettings:
    """What emo-serve adds to vLLM's flags.

    `model` is the directory or Hub id that the user gave; None means the shipped demo. At most one
    of `expert_memory_bytes` (per device) and `expert_slots` (per layer) is set; with neither, the
    slab holds all experts, on a CPU as many as fit. `host_expert_bytes` is host memory per device,
    0 for none. `preload` None means every pool, in the catalog's order; `auto_method` None means
    both vote while all pools have examples, else the router. Raises ConfigError for an
    invalid value.
    """

    model: str | None = None
    pools_dir: Path | None = flag(
        "--pools",
        read_path,
        default=None,
        metavar="DIR",
        help="directory of pool files, one JSON file per pool",
    )
    default_pool: str | None = flag(
        "--default-pool",
        read_text,
        default=None,
        metavar="NAME",
        help="pool for requests that name only the model (default: base, all experts)",
    )
    default_experts: int | None = flag(
        "--default-experts",
        read_int,
        default=None,
        metavar="K",
        help="experts per layer of a pool that is named without a size, if its file has scores and"
        " no default_experts: its K best (default: the experts that the file lists)",
    )
    elastic_min_experts: int | None = flag(
        "--elastic-min-experts",
        read_int,
        default=None,
        metavar="K",
        help="serve a request whose pool is not resident at once in the largest smaller size of it"
        " that is, of at least K experts per layer, while the pool loads, the best experts first;"
        " applies to pools with scores (default: requests wait for the whole pool, except those"
        " that send x-emo-min-experts)",
    )
    expert_memory_bytes: int | None = flag(
        "--expert-memory",
        parse_size,
        default=None,
        metavar="SIZE",
        help="device memory for experts, e.g. 8GiB, per device under tensor parallelism;"
        " without it the slab holds all experts, on a CPU as many as fit in free memory; with all"
        " experts the base pool is resident too",
    )
    expert_slots: int | None = flag(
        "--expert-slots",
        read_int,
        default=None,
        metavar="N",
        help="the same limit, given as a number of slots per layer",
    )
    stream_slots: int | None = flag(
        "--stream-slots",
        read_int,
        default=None,
        metavar="N",
        help="slots per layer beside those for pools, through which the experts of a pool pass"
        " that is too large for the slots, such as the base pool: it is served at once and exactly,"
        " but slowly; with 0 such pools are refused; CPUs only (default: as many as a token takes"
        " experts; 0 if the slots hold all experts, and on CUDA)",
    )
    preload: tuple[str, ...] | None = flag(
        "--preload",
        read_list,
        default=None,
        metavar="NAME,...",
        help="pools to make resident at start, in this order, as long as they fit"
        " (default: all, in order of name)",
    )
    pin: tuple[str, ...] = flag(
        "--pin",
        read_list,
        default=(),
        metavar="NAME,...",
        help="pools to make resident first, and to keep resident until they are unpinned",
    )
    host_expert_bytes: int = flag(
        "--host-expert-memory",
        parse_size,
        default=0,
        metavar="SIZE",
        help="host memory per device that keeps experts for later loads once they have been read"
        " (default: none, every load reads the checkpoint's files)",
    )
    eviction_policy: str = flag(
        "--eviction-policy",
        read_text,
        default=POLICIES[0],
        metavar="|".join(POLICIES),
        help="which pool to evict when another needs its slots: the least frequently used of late,"
        " the least recently used, or first those that --preload does not name",
    )
    max_waiting: int = flag(
        "--max-waiting",
        read_int,
        default=256,
        metavar="N",
        help="how many requests may wait for pools to be loaded; further ones get 503",
    )
    max_queued: int | None = flag(
        "--max-queued",
        read_int,
        default=None,
        metavar="N",
        help="how many completions may be admitted beyond those that the engine can run at once;"
        " further ones get 503, except the first request of a pool that has none (default: four"
        " times what the engine can run at once, at least 256)",
    )
    load_deadline_seconds: float = flag(
        "--load-deadline",
        read_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a request waits for its pool before it gets 503",
    )
    router_temperatures: tuple[float, float] | None = flag(
        "--router-temperatures",
        read_range,
        default=None,
        metavar="LOW,HIGH",
        help="the lowest and the highest router temperature that a request may ask for with"
        " x-emo-router-temperature (default: none, requests route at their pool's)",
    )
    moe_backend: str = flag(
        "--moe-backend",
        read_text,
        default="auto",
        metavar="|".join(MOE_BACKENDS),
        dest="emo_moe_backend",  # vLLM has a flag of this name, which EMO's layers do not read
        help="what computes the experts: our CUDA kernels (triton), our kernel for CPUs, or vLLM's"
        " where ours cannot run (cpu), or plain torch on any device (reference); auto picks the"
        " fastest that can run; replaces vLLM's flag of this name",
    )
    expert_dtype: str = flag(
        "--expert-dtype",
        read_text,
        default=EXPERT_DTYPES[0],
        metavar="|".join(EXPERT_DTYPES),
        help="dtype of experts in their slots: auto is --dtype; fp8_e4m3, with one scale per output"
        " channel, takes half the memory of a 16-bit dtype and needs --moe-backend triton",
    )
    max_pools: int = flag(
        "--max-pools",
        read_int,
        default=64,
        metavar="N",
        help="rows of the pool table: pools, sizes and unions that can be in use at once",
    )
    drain_timeout_seconds: float = flag(
        "--drain-timeout",
        read_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long the server waits for running and waiting requests after SIGTERM",
    )
    step_deadline_seconds: float = flag(
        "--step-deadline",
        read_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long the engine may go without a step while it has work before /ready answers"
        " 503; give more than the longest step takes: a prefill of --max-num-batched-tokens, or"
        " compiling",
    )
    admin_api_keys: tuple[str, ...] = flag(
        "--admin-api-key",
        read_text,
        default=(),
        metavar="KEY",
        is_repeatable=True,
        help="key that may add, remove, load, evict and pin pools, and may do everything that a"
        " key of --api-key may; can be given several times. Without it, pools can be changed only"
        " on a server that listens on a loopback --host or a Unix socket: by a key of --api-key,"
        " and without either key by anyone on this machine",
    )
    open_paths: tuple[str, ...] = flag(
        "--open-paths",
        read_list,
        default=_OPEN_PATHS,
        metavar="PATH,...",
        help="paths that need no key when --api-key is set",
    )
    max_body_bytes: int = flag(
        "--max-body-size",
        parse_size,
        default=8 * 2**20,
        default_text="8MiB",
        metavar="SIZE",
        help="largest body of a request; larger ones get 413",
    )
    request_log: Path | None = flag(
        "--request-log",
        read_path,
        default=None,
        metavar="FILE",
        help="append one JSON line per request: pool, waiting time, duration, tokens; no text",
    )
    auto_method: str | None = flag(
        "--auto-method",
        read_text,
        default=None,
        metavar="|".join(AUTO_METHODS),
        help=f"how to choose the pool for model {AUTO_POOL!r}: with a classifier that learns from"
        " examples (tfidf), or with the model's router, which needs none but costs an engine step"
        " (default: both vote while all pools have examples, else the router)",
    )
    auto_examples: Path | None = flag(
        "--auto-examples",
        read_path,
        default=None,
        metavar="DIR",
        help="examples for the classifier: NAME.jsonl or NAME.txt has texts of pool NAME's domain",
    )
    keep_examples: bool = flag(
        "--keep-examples",
        read_switch,
        default=False,
        metavar=None,
        help="keep the examples of pools built on the server beside their files, readable by their"
        " owner only, so that they can be used again (default: only counts that the classifier of"
        f" {AUTO_POOL!r} learns from are kept)",
    )
    auto_tokens: int = flag(
        "--auto-tokens",
        read_int,
        default=256,
        metavar="N",
        help="how many tokens at the start of a prompt are read to choose its pool",
    )
    auto_min_coverage: float = flag(
        "--auto-min-coverage",
        read_share,
        default=0.4,
        metavar="SHARE",
        help="share of the router's mass that the best pool must cover; below it the base pool is"
        " chosen, if it is resident; applies to the router only",
    )

    def __post_init__(self) -> None:
        self._check_memory()
        if self.pools_dir is not None and not self.pools_dir.is_dir():
            raise ConfigError(f"--pools {self.pools_dir} is not a directory")
        for name, value, known in (
            ("--moe-backend", self.moe_backend, MOE_BACKENDS),
            ("--expert-dtype", self.expert_dtype, EXPERT_DTYPES),
            ("--eviction-policy", self.eviction_policy, POLICIES),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; give one of {', '.join(known)}")
        check_expert_dtype(self.expert_dtype, self.moe_backend)
        if self.max_pools < 2:
            raise ConfigError(
                f"--max-pools is {self.max_pools}; the base pool takes one row, so give at least 2"
            )
        if self.max_body_bytes < 1024:
            raise ConfigError(
                f"--max-body-size is {self.max_body_bytes} bytes; give at least 1KiB, e.g. 8MiB"
            )
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting is {self.max_waiting}; give 0 or more")
        if self.max_queued is not None and self.max_queued < 0:
            raise ConfigError(f"--max-queued is {self.max_queued}; give 0 or more")
        for name, seconds in (
            ("--load-deadline", self.load_deadline_seconds),
            ("--step-deadline", self.step_deadline_seconds),
        ):
            if not (0 < seconds < math.inf):
                raise ConfigError(f"{name} is {seconds}; give a finite number above 0")
        if not (0 <= self.drain_timeout_seconds < math.inf):
            raise ConfigError(
                f"--drain-timeout is {self.drain_timeout_seconds}; give a finite number, 0 or more"
            )
        if self.router_temperatures is not None:
            low, high = self.router_temperatures
            if not 0 < low <= high < math.inf:
                raise ConfigError(
                    f"--router-temperatures is {low:g},{high:g}; give two finite numbers above 0,"
                    " the lower first"
                )
        self._check_names()
        if not all(self.admin_api_keys):
            raise ConfigError("--admin-api-key is empty; give a key, or leave it out")
        for path in self.open_paths:
            if not path.startswith("/"):
                raise ConfigError(f"--open-paths: {path!r} is not a path; give e.g. /metrics")
        self._check_auto()

    def _check_memory(self) -> None:
        if self.default_experts is not None and self.default_experts < 1:
            raise ConfigError(f"--default-experts is {self.default_experts}; give at least 1")
        if self.elastic_min_experts is not None and self.elastic_min_experts < 1:
            raise ConfigError(
                f"--elastic-min-experts is {self.elastic_min_experts}; give at least 1"
            )
        if self.expert_memory_bytes is not None and self.expert_slots is not None:
            raise ConfigError("--expert-memory and --expert-slots set the same limit; give one")
        if self.expert_slots is not None and self.expert_slots < 1:
            raise ConfigError(f"--expert-slots is {self.expert_slots}; give at least 1")
        if self.stream_slots is not None and self.stream_slots < 0:
            raise ConfigError(f"--stream-slots is {self.stream_slots}; give 0 or more")
        if self.expert_memory_bytes is not None and self.expert_memory_bytes < 1:
            raise ConfigError(f"--expert-memory is {self.expert_memory_bytes} bytes; raise it")

    def _check_auto(self) -> None:
        if self.auto_method not in (None, *AUTO_METHODS):
            raise ConfigError(
                f"--auto-method is {self.auto_method!r}; give one of {', '.join(AUTO_METHODS)}"
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
        for option, names in (("--preload", self.preload or ()), ("--pin", self.pin)):
            for name in names:
                _check_pool_name(option, name)
            if len(set(names)) != len(names):
                raise ConfigError(f"{option} {','.join(names)} names a pool twice; name it once")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ServeSettings:
        """Build the settings from parsed flags of `add_serve_flags`; raises ConfigError."""
        values = {name: entry.value(args, default) for name, entry, default in flags_of(cls)}
        return cls(model=args.model_tag, **cast(dict[str, Any], values))


PATH_FLAGS = tuple(entry.name for _, entry, _ in flags_of(ServeSettings) if entry.read is read_path)
"""Our flags whose values are files or directories."""


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags of `emo-serve serve`; ours replaces a flag of vLLM's with the same name.

    Values stay text here. ServeSettings reads them, so that every invalid value is reported alike.
    """
    group = parser.add_argument_group("emo-serve", "what emo-serve adds to `vllm serve`")
    for _, entry, default in flags_of(ServeSettings):
        entry.add_to(group, default)


def _check_pool_name(flag: str, name: str) -> None:
    if not is_pool_or_union(name):
        raise ConfigError(
            f"{flag}: {name!r} cannot be the name of a pool; a name is {REQUEST_RULE}"
        )


# -- slots --


def slots_for_memory(budget_bytes: int, slot_bytes: int, experts_per_layer: Sequence[int]) -> int:
    """Return the largest number of slots per layer that fits the budget, at most all experts.

    `experts_per_layer` lists MoE layers only; no layer gets more slots than it has experts. Raises
    ConfigError if not even one slot per layer fits.
    """
    slots = 0
    for candidate in range(1, max(experts_per_layer) + 1):
        needed = sum(min(candidate, experts) for experts in experts_per_layer)
        if needed * slot_bytes > budget_bytes:
            break
        slots = candidate
    if slots == 0:
        raise ConfigError(
            f"--expert-memory {format_gib(budget_bytes)} is too small: one slot in each of"
            f" {len(experts_per_layer)} MoE layers takes"
            f" {format_gib(len(experts_per_layer) * slot_bytes)}; raise it"
        )
    return slots
