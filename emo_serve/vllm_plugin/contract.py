"""What the front end and the engine's workers agree on; both sides import it, so it is light.

Three things cross between their processes. `PluginSettings` goes to every worker when the engine
starts, inside EngineArgs.additional_config. `RequestTag` goes with each request, inside
SamplingParams.extra_args. The records go back, each as the reply to one worker call.

A reply crosses as one flat dict of builtins: `call_id`, `ok` and `error`, and, when it is ok, the
fields of the record. vLLM's serialisation turns the tuples in it into lists.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, TypeGuard

from emo_serve.errors import ConfigError

__all__ = [
    "ACCOUNT_ARG",
    "ADDITIONAL_CONFIG_KEY",
    "BASE_POOL_ROW",
    "END_WITH_PARENT_VARIABLE",
    "EXPERT_DTYPES",
    "LOAD_FORMAT",
    "MASS_SLOTS",
    "MASS_SLOT_ARG",
    "MOE_BACKENDS",
    "NO_ACCOUNT",
    "NO_MASS_SLOT",
    "POOL_ROW_ARG",
    "STREAMED_ARG",
    "CoverageReading",
    "CoverageRow",
    "EngineDescription",
    "LoadProgress",
    "LoadState",
    "PluginSettings",
    "PoolUsage",
    "RequestTag",
    "RouterMass",
    "check_expert_dtype",
    "check_moe_backend",
    "device_obstacle",
    "expert_bytes",
]

LOAD_FORMAT = "emo"
"""Load format that reads the trunk only; worker calls load the experts."""

# -- settings --

ADDITIONAL_CONFIG_KEY = "emo_serve"
"""Key of EngineArgs.additional_config whose value holds the fields of PluginSettings."""

MOE_BACKENDS = ("auto", "triton", "cpu", "reference")
"""Expert maths: our CUDA kernels, a CPU kernel (ours or vLLM's), or plain torch anywhere."""

EXPERT_DTYPES = ("auto", "fp8_e4m3")
"""Expert weights in their slots: the activations' dtype, or fp8 with one scale per row."""


@dataclass(frozen=True)
class PluginSettings:
    """What the front end decides for the workers.

    `num_slots` is per layer, `num_pools` the number of rows in the pool table. `host_expert_bytes`
    is host memory for experts per device; 0 means none. `stream_slots` per layer come on top of
    `num_slots`, for pools that do not fit; without them, every published pool must fit.
    """

    num_slots: int
    num_pools: int
    moe_backend: str = MOE_BACKENDS[0]
    expert_dtype: str = EXPERT_DTYPES[0]
    host_expert_bytes: int = 0
    records_routing: bool = True
    stream_slots: int = 0

    def to_config(self) -> dict[str, Any]:
        """Return these settings as an entry of EngineArgs.additional_config."""
        return {ADDITIONAL_CONFIG_KEY: asdict(self)}

    @classmethod
    def from_config(cls, additional_config: Mapping[str, Any]) -> PluginSettings:
        """Read the entry that `to_config` made.

        Raises ConfigError for unknown or missing fields and for values out of range.
        """
        name = f"additional_config[{ADDITIONAL_CONFIG_KEY!r}]"
        given = additional_config[ADDITIONAL_CONFIG_KEY]
        expected = {field.name for field in fields(cls)}
        if set(given) != expected:
            raise ConfigError(f"{name} has {sorted(given)}, expected {sorted(expected)}")
        for key, known in (("moe_backend", MOE_BACKENDS), ("expert_dtype", EXPERT_DTYPES)):
            if given[key] not in known:
                raise ConfigError(
                    f"{name}: {key} is {given[key]!r}, which is not one of {', '.join(known)}"
                )
        if min(given["num_slots"], given["num_pools"]) < 1:
            raise ConfigError(f"{name} is {given}: num_slots and num_pools must be at least 1")
        if given["stream_slots"] < 0:
            raise ConfigError(f"{name} is {given}: stream_slots must be at least 0")
        return cls(**given)


# -- requests --

POOL_ROW_ARG = "emo_pool_row"
"""Key of SamplingParams.extra_args: the row of the pool table that a request routes within."""

ACCOUNT_ARG = "emo_account"
"""Likewise: the number, from 1, under which the request's coverage is summed."""

MASS_SLOT_ARG = "emo_mass_slot"
"""Likewise: which of MASS_SLOTS sums receives the router's mass of each expert."""

STREAMED_ARG = "emo_streamed"
"""Likewise: true if the request's pool is streamed, so that it runs in steps of its own kind."""

END_WITH_PARENT_VARIABLE = "EMO_SERVE_END_WITH_PARENT"
"""The environment variable that makes the engine's processes end with those that started them."""

BASE_POOL_ROW = 0
"""The base pool's row; requests that name no row get it."""

NO_ACCOUNT = 0
_MOST_ACCOUNTS = 2**62
MASS_SLOTS = 16
NO_MASS_SLOT = -1


class RequestTag(NamedTuple):
    """What the front end tells the workers about a request: where it routes, what to sum up."""

    row: int = BASE_POOL_ROW
    account: int = NO_ACCOUNT
    mass_slot: int = NO_MASS_SLOT

    def to_extra_args(self) -> dict[str, int]:
        """Return the tag as entries of SamplingParams.extra_args."""
        return {POOL_ROW_ARG: self.row, ACCOUNT_ARG: self.account, MASS_SLOT_ARG: self.mass_slot}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any], num_rows: int) -> RequestTag:
        """Read a tag for a pool table of `num_rows`; never raises.

        Under plain `vllm serve` any client can write these entries. One that is not a valid number
        counts as missing.
        """
        row = extra_args.get(POOL_ROW_ARG)
        account = extra_args.get(ACCOUNT_ARG)
        slot = extra_args.get(MASS_SLOT_ARG)
        return cls(
            row if _is_index(row, num_rows) else BASE_POOL_ROW,
            account if _is_index(account, _MOST_ACCOUNTS) else NO_ACCOUNT,
            slot if _is_index(slot, MASS_SLOTS) else NO_MASS_SLOT,
        )


def _is_index(value: object, count: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < count


# -- replies --

LoadState = Literal["loading", "published", "failed"]


@dataclass(frozen=True)
class LoadProgress:
    """How far one rank is with a load; reply to `emo_finish_load`.

    A rank copies the experts of its own pipeline `stage` only, all ranks of a stage the same ones.
    `failure` is the reason of a failed load. `bytes_copied` went into slots, `bytes_read` came from
    files. `disk_reads` and `host_hits` count experts, by where they were found.
    """

    stage: int
    state: LoadState
    failure: str | None
    experts_copied: int
    bytes_copied: int
    bytes_read: int
    disk_reads: int
    host_hits: int


@dataclass(frozen=True)
class EngineDescription:
    """What one rank holds; reply to `emo_describe`. All sizes are this rank's, in bytes.

    `num_slots` has one entry per MoE layer of the rank's pipeline `stage`, and `slot_bytes` is the
    largest slot's. `bytes_read`, `disk_reads` and `host_hits` count since the start, the trunk's
    bytes included. `dtype` is that of the trunk and of activations, `expert_dtype` that of experts
    in their slots. `routes_by_pool` says that the model runner gives the model each token's pool
    row.
    """

    rank: int
    stage: int
    trunk_bytes: int
    slab_bytes: int
    slot_bytes: int
    num_slots: tuple[int, ...]
    kv_cache_bytes: int
    bytes_read: int
    disk_reads: int
    host_hits: int
    host_bytes: int
    host_experts: int
    peak_rss_bytes: int
    dtype: str
    expert_dtype: str
    moe_backend: str
    model_runner: str
    records_routing: bool
    routes_by_pool: bool


class CoverageRow(NamedTuple):
    """The mass inside the pool, summed over the tokens of one account."""

    account: int
    mass: float
    tokens: int


@dataclass(frozen=True)
class CoverageReading:
    """Coverage since the last reading, one row per account; reply to `emo_read_coverage`.

    Its mass is a mean over `num_layers` layers: those with standard experts in the rank's stage.
    And since the start, what was streamed: experts read, and the seconds that steps waited for
    them, told by one rank of each stage.
    """

    coverage: tuple[CoverageRow, ...]
    num_layers: int
    streamed_experts: int = 0
    stream_seconds: float = 0.0


@dataclass(frozen=True)
class RouterMass:
    """The full router's probability of each expert, summed over tokens; fp64.

    Reply to `emo_read_mass`. `layers` has [E] per layer, () for a dense layer and one of another
    stage: the softmax over standard experts, and the shared experts' own
    (`emo.routing.router_probabilities`).
    """

    tokens: int
    layers: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PoolUsage:
    """How many tokens a pool routed, and how many of them took each expert.

    Reply to `emo_usage`. `counts` has [E] per layer, () for a dense layer and one of another stage.
    """

    tokens: int
    counts: tuple[tuple[int, ...], ...]


# -- checks that both sides make --


def device_obstacle(moe_backend: str, device_type: str) -> str | None:
    """Return why no device of this kind can run a backend; None if some can."""
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
    """Raise ConfigError for a backend that no device of this kind can run."""
    obstacle = device_obstacle(moe_backend, device_type)
    if obstacle is not None:
        raise ConfigError(f"{obstacle}; use --moe-backend reference")


def check_expert_dtype(expert_dtype: str, moe_backend: str, device_type: str | None = None) -> None:
    """Raise ConfigError for fp8 experts where our kernels cannot run.

    `device_type` None means that the device is not known yet. The workers check what only the
    device itself can tell, such as its compute capability.
    """
    if expert_dtype == EXPERT_DTYPES[0]:
        return
    # auto picks our kernels on CUDA only: the interpreter must be asked for by name.
    uses_our_kernels = moe_backend == "triton" or (
        moe_backend == "auto" and device_type in (None, "cuda")
    )
    obstacle = None if device_type is None else device_obstacle("triton", device_type)
    if not uses_our_kernels or obstacle is not None:
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
    """Return the bytes of one slot on one device: gate, up and down of an expert's part, scales.

    `dtype_bytes` is the size of one activation. Raises ConfigError if the ranks do not divide
    `intermediate_size`.
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
    return weights + 4 * (2 * width + hidden_size)  # fp32 scales: rows of w13 [2F, D], w2 [D, F]
