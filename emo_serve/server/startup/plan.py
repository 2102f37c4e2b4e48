"""What start-up will do, decided before the engine starts: slots, pools and their order.

A start takes a minute; a flag that cannot work is refused here, within a second. The plan loads
nothing: it checks that the pools fit by placing them in a SlotTable of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emo_serve.config import (
    ServeSettings,
    format_gib,
    slots_for_memory,
)
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import ConfigError, RequestError
from emo_serve.names import BASE_POOL, ModelNames, split_name
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.slots import SlotTable
from emo_serve.vllm_plugin.contract import expert_bytes

__all__ = ["StartPlan", "choose_slots", "make_plan"]


@dataclass(frozen=True)
class StartPlan:
    """The model, its pools and what to make resident at start.

    `pinned` pools are loaded first and all fit together, then those of `load_order` while there is
    room; every other pool is loaded when a request asks for it. `preferred` holds the content
    hashes of the pools that --preload names. `experts_per_layer` has 0 for a dense layer;
    `num_slots` is per layer.
    """

    experts_per_layer: tuple[int, ...]
    num_slots: int
    catalog: PoolCatalog
    base_pool: ExpertPool
    names: ModelNames
    pinned: tuple[ExpertPool, ...]
    load_order: tuple[ExpertPool, ...]
    preferred: frozenset[str]


def make_plan(
    settings: ServeSettings,
    checkpoint: Checkpoint,
    base_names: Sequence[str],
    dtype_bytes: int,
    tensor_parallel_size: int,
    *,
    persists: bool,
) -> StartPlan:
    """Read the pools of a checkpoint and plan the start; raises ConfigError.

    `dtype_bytes` is the size of one activation. With `persists`, pools added and removed while
    serving are written to --pools.
    """
    config = checkpoint.config
    moe_layers = config.moe_layers
    experts_per_layer = tuple(layer.num_experts if layer else 0 for layer in moe_layers)
    slot_bytes = expert_bytes(
        config.hidden_size,
        config.intermediate_size,
        settings.expert_dtype,
        dtype_bytes,
        tensor_parallel_size,
    )
    num_slots = choose_slots(settings, experts_per_layer, slot_bytes)
    _check_host_memory(settings, slot_bytes)
    fingerprint = checkpoint.fingerprint()
    names = ModelNames(tuple(base_names), settings.default_pool or BASE_POOL)
    catalog = PoolCatalog((), moe_layers, fingerprint)
    if settings.pools_dir is not None:
        catalog = PoolCatalog.read(
            *(settings.pools_dir, moe_layers, fingerprint),
            persists=persists,
            check_free=names.check_free,
        )
    base_pool = ExpertPool.base(moe_layers, name=BASE_POOL)
    order = _load_order(settings, catalog, base_pool, num_slots >= max(experts_per_layer))
    plan = StartPlan(
        experts_per_layer,
        num_slots,
        catalog,
        base_pool,
        names,
        pinned=tuple(_named(name, catalog, base_pool) for name in settings.pin),
        load_order=order,
        preferred=frozenset(
            _named(name, catalog, base_pool).content_hash for name in settings.preload or ()
        ),
    )
    _rehearse(settings, plan, slot_bytes)
    return plan


def choose_slots(settings: ServeSettings, experts_per_layer: Sequence[int], slot_bytes: int) -> int:
    """Return the slots per layer; without a limit, one for every expert. Raises ConfigError."""
    counts = [count for count in experts_per_layer if count]
    if not counts:
        raise ConfigError("the model has no MoE layer, so it has no experts to make pools of")
    if settings.expert_slots is not None:
        if settings.expert_slots > max(counts):
            raise ConfigError(
                f"--expert-slots is {settings.expert_slots}; a layer has at most {max(counts)}"
                " experts; lower it, or leave it out to hold all"
            )
        return settings.expert_slots
    if settings.expert_memory_bytes is not None:
        return slots_for_memory(settings.expert_memory_bytes, slot_bytes, counts)
    return max(counts)


def _check_host_memory(settings: ServeSettings, slot_bytes: int) -> None:
    if 0 < settings.host_expert_bytes < slot_bytes:
        raise ConfigError(
            f"--host-expert-memory {format_gib(settings.host_expert_bytes)} is too small: one"
            f" expert takes {format_gib(slot_bytes)}; raise it, or leave it out to keep none"
        )


def _load_order(
    settings: ServeSettings, catalog: PoolCatalog, base_pool: ExpertPool, holds_all: bool
) -> tuple[ExpertPool, ...]:
    """Return the pools to load at start, in order; raises ConfigError for unknown names.

    Those are the base pool if it fits, the default pool, the pools of --preload, then all others;
    or --preload's alone if it is given and the slots cannot hold all experts.
    """
    known = {**catalog.pools, base_pool.name: base_pool}
    preload, default = settings.preload, settings.default_pool
    for flag, asked in (
        ("--pin", settings.pin),
        ("--preload", preload or ()),
        ("--default-pool", [default or BASE_POOL]),
    ):
        for name in _single_names(asked):
            if name not in known:
                names = ", ".join(known)
                raise ConfigError(f"{flag}: there is no pool {name!r}; the pools are: {names}")
    wanted: list[str] = [base_pool.name] if holds_all else []
    if preload is None or holds_all:
        # With all experts in slots, a pool costs only a row, so all pools are loaded.
        wanted += [*_single_names([default] if default else []), *(preload or ()), *catalog.pools]
    else:
        wanted += preload
    return tuple(_named(name, catalog, base_pool) for name in dict.fromkeys(wanted))


def _named(name: str, catalog: PoolCatalog, base_pool: ExpertPool) -> ExpertPool:
    """Return a pool named on the command line, after its names were checked."""
    if base_pool.name in split_name(name):
        return base_pool  # a union with it holds nothing more
    try:
        return catalog.resolve(name)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def _single_names(names: Iterable[str]) -> list[str]:
    return [part for name in names for part in split_name(name)]


def _rehearse(settings: ServeSettings, plan: StartPlan, slot_bytes: int) -> None:
    """Raise ConfigError if no pool could ever be served, or not the default pool or the pins."""
    table = SlotTable(plan.experts_per_layer, plan.num_slots)
    for pool in plan.pinned:
        if pool.content_hash in table.keys:
            continue
        if not table.fits(pool.expert_ids):
            raise ConfigError(
                f"--pin {','.join(settings.pin)}: these pools do not fit together in"
                f" {plan.num_slots} slots per layer: there is no room for {pool.name!r}; pin fewer,"
                f" or raise --expert-memory or --expert-slots"
            )
        table.begin(table.plan_load(pool.content_hash, pool.expert_ids))
        table.finish(pool.content_hash)
    pools = (plan.base_pool, *plan.catalog.pools.values())
    if not any(table.fits(pool.expert_ids) for pool in pools):
        raise ConfigError(_nothing_fits(plan, slot_bytes))
    if settings.default_pool is None:
        return
    pool = _named(settings.default_pool, plan.catalog, plan.base_pool)
    if not table.fits(pool.expert_ids):
        beside = " beside the pinned pools" if plan.pinned else ""
        raise ConfigError(
            f"--default-pool {settings.default_pool} does not fit in {plan.num_slots} slots per"
            f" layer{beside}; raise --expert-memory or --expert-slots"
        )


def _nothing_fits(plan: StartPlan, slot_bytes: int) -> str:
    if not plan.catalog.pools:
        total = sum(plan.experts_per_layer)
        refused = "".join(f"; refused: {error}" for error in plan.catalog.refused)
        return (
            f"{plan.num_slots} slots per layer cannot hold the base pool, whose {total} experts"
            f" take {format_gib(total * slot_bytes)} per device, and there is no other pool; give"
            f" --pools, or raise --expert-memory or --expert-slots{refused}"
        )
    smallest = min(plan.catalog.pools.values(), key=lambda pool: max(map(len, pool.expert_ids)))
    needed = max(map(len, smallest.expert_ids))
    return (
        f"no pool fits in {plan.num_slots} slots per layer: the smallest, {smallest.name!r}, needs"
        f" {needed}; raise --expert-slots, or --expert-memory to"
        f" {format_gib(slot_bytes * sum(min(needed, count) for count in plan.experts_per_layer))}"
    )
