"""What start-up will do, decided before the engine starts: memory, slots, pools and their order.

A start takes a minute; a flag that cannot work is refused here, within a second. The plan loads
nothing: it checks that the pools fit by placing them in a SlotTable of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.config import (
    ServeSettings,
    format_gib,
    slots_for_memory,
)
from emo_serve.errors import ConfigError
from emo_serve.names import BASE_POOL, ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.slots import SlotTable
from emo_serve.server.startup.machine_memory import MemoryLimit
from emo_serve.server.startup.memory import (
    Given,
    KvNeed,
    MemoryNeed,
    MemoryPlan,
    PoolSlots,
    plan_memory,
    process_bytes,
)
from emo_serve.server.startup.named_pools import (
    check_default_experts,
    check_names,
    named_pool,
    note_sizeless,
    single_names,
)
from emo_serve.server.vllm_adapter.sizes import CpuSizes, EngineSizes
from emo_serve.vllm_plugin.contract import expert_bytes

__all__ = ["StartPlan", "make_plan"]

_LONG_STEP_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StartPlan:
    """The model, its pools and what to make resident at start.

    `pinned` pools are loaded first and all fit together, then those of `load_order` while there is
    room; every other pool is loaded when a request asks for it. `preferred` holds the content
    hashes of the pools that --preload names. `experts_per_layer` has 0 for a dense layer;
    `num_slots` and `stream_slots` are per layer. `memory` is None on a device with memory of its
    own, which vLLM divides.
    """

    experts_per_layer: tuple[int, ...]
    num_slots: int
    stream_slots: int
    memory: MemoryPlan | None
    catalog: PoolCatalog
    base_pool: ExpertPool
    names: ModelNames
    pinned: tuple[ExpertPool, ...]
    load_order: tuple[ExpertPool, ...]
    preferred: frozenset[str]

    @property
    def has_long_steps(self) -> bool:
        """Tell whether a step on a CPU takes so long that the other processes hardly need a core.

        Each step reads the trunk: 256 MiB take some 10 ms.
        """
        return self.memory is not None and self.memory.need.trunk_bytes >= _LONG_STEP_BYTES


def make_plan(
    settings: ServeSettings,
    checkpoint: ModelCheckpoint,
    base_names: Sequence[str],
    sizes: EngineSizes,
    limits: Sequence[MemoryLimit] = (),
    *,
    persists: bool,
) -> StartPlan:
    """Read the pools of a checkpoint and plan the start; raises ConfigError.

    `limits` are those of the machine's memory, the smallest first; they count on a CPU only. With
    `persists`, pools added and removed while serving are written to --pools.
    """
    moe_layers = checkpoint.facts.moe_layers
    experts_per_layer = checkpoint.facts.experts_per_layer
    slot_bytes = _slot_bytes(settings, checkpoint, sizes)
    _refuse_for_dense(settings, checkpoint)
    num_slots = _given_slots(settings, experts_per_layer, slot_bytes)
    _check_host_memory(settings, slot_bytes)
    check_default_experts(settings, checkpoint)
    fingerprint = checkpoint.fingerprint()
    names = ModelNames(tuple(base_names), settings.default_pool or BASE_POOL)
    catalog = PoolCatalog((), moe_layers, fingerprint, settings.default_experts)
    if settings.pools_dir is not None:
        catalog = PoolCatalog.read(
            *(settings.pools_dir, moe_layers, fingerprint),
            default_experts=settings.default_experts,
            persists=persists,
            check_free=names.check_free,
        )
        note_sizeless(settings, catalog)
    base_pool = ExpertPool.base(moe_layers, name=BASE_POOL)
    check_names(settings, catalog, base_pool)
    memory, stream_slots = None, _stream_slots(settings, checkpoint, sizes)
    if sizes.cpu is not None:
        pool_slots = _pool_slots(settings, catalog, base_pool, may_stream=stream_slots > 0)
        need = _memory_need(settings, checkpoint, sizes, sizes.cpu, pool_slots, stream_slots)
        given = _given(settings, num_slots, sizes, sizes.cpu)
        memory = plan_memory(need, limits, given)
        num_slots = memory.num_slots
        stream_slots = need.stream_slots_beside(num_slots)
    num_slots = num_slots or max(1, *experts_per_layer)  # 1 says nothing of a dense model
    holds_all = num_slots >= max(experts_per_layer)
    order = _load_order(
        settings, catalog, base_pool, holds_all, is_base_served=holds_all or stream_slots > 0
    )
    plan = StartPlan(
        experts_per_layer,
        num_slots,
        stream_slots,
        memory,
        catalog,
        base_pool,
        names,
        pinned=tuple(named_pool(name, catalog, base_pool) for name in settings.pin),
        load_order=order,
        preferred=frozenset(
            named_pool(name, catalog, base_pool).content_hash for name in settings.preload or ()
        ),
    )
    _rehearse(settings, plan, slot_bytes)
    return plan


def _refuse_for_dense(settings: ServeSettings, checkpoint: ModelCheckpoint) -> None:
    """Raise ConfigError for flags about experts if the model has none."""
    given = {
        "--expert-slots": settings.expert_slots is not None,
        "--expert-memory": settings.expert_memory_bytes is not None,
        "--stream-slots": bool(settings.stream_slots),
        "--host-expert-memory": settings.host_expert_bytes > 0,
        "--default-experts": settings.default_experts is not None,
        "--pools": settings.pools_dir is not None,
    }
    flag = next((flag for flag, is_given in given.items() if is_given), None)
    if checkpoint.facts.is_dense and flag is not None:
        raise ConfigError(
            f"{flag}: {checkpoint.directory.name} is dense: it has no experts, and no pool but"
            f" {BASE_POOL}; leave {flag} out"
        )


def _given_slots(
    settings: ServeSettings, experts_per_layer: Sequence[int], slot_bytes: int
) -> int | None:
    """Return the slots per layer that the user gives, None without; raises ConfigError."""
    counts = [count for count in experts_per_layer if count]
    if settings.expert_slots is not None:
        if settings.expert_slots > max(counts):
            raise ConfigError(
                f"--expert-slots is {settings.expert_slots}; a layer has at most {max(counts)}"
                " experts; lower it, or leave it out to hold as many as fit"
            )
        return settings.expert_slots
    if settings.expert_memory_bytes is not None:
        return slots_for_memory(settings.expert_memory_bytes, slot_bytes, counts)
    return None


def _stream_slots(settings: ServeSettings, checkpoint: ModelCheckpoint, sizes: EngineSizes) -> int:
    """Return the stream slots per layer if the slots do not hold all; raises ConfigError.

    By default as many as a token takes experts, so that one token never needs two turns.
    """
    given, moe_layers = settings.stream_slots, checkpoint.facts.moe_layers
    obstacle = None
    if sizes.cpu is None:
        obstacle = (
            "on CUDA a step runs in captured graphs, in which the host cannot choose what to copy;"
            " leave it out, and raise --expert-memory to hold all experts"
        )
    elif settings.moe_backend == "triton":
        obstacle = "--moe-backend triton cannot stream experts; leave one of them out"
    if obstacle is not None:
        if given:
            raise ConfigError(f"--stream-slots {given}: {obstacle}")
        return 0
    if given is not None:
        most = max(checkpoint.facts.experts_per_layer)
        if given > most:
            raise ConfigError(
                f"--stream-slots is {given}; a layer has at most {most} experts; lower it"
            )
        return given
    return max((moe.top_k for moe in moe_layers if moe is not None), default=0)


# -- memory --


def _slot_bytes(settings: ServeSettings, checkpoint: ModelCheckpoint, sizes: EngineSizes) -> int:
    """Return the bytes of one slot on one device."""
    facts = checkpoint.facts
    return expert_bytes(
        *(facts.hidden_size, facts.expert_width, settings.expert_dtype),
        *(sizes.dtype_bytes, sizes.num_ranks),
    )


def _memory_need(
    settings: ServeSettings,
    checkpoint: ModelCheckpoint,
    sizes: EngineSizes,
    cpu: CpuSizes,
    pools: PoolSlots,
    stream_slots: int,
) -> MemoryNeed:
    """Return what all workers together need."""
    ranks = sizes.num_ranks
    return MemoryNeed(
        trunk_bytes=checkpoint.num_trunk_parameters * sizes.dtype_bytes,
        process_bytes=process_bytes(sizes.num_workers),
        host_expert_bytes=settings.host_expert_bytes * sizes.num_workers,
        slot_bytes=_slot_bytes(settings, checkpoint, sizes) * ranks,
        experts_per_layer=tuple(filter(None, checkpoint.facts.experts_per_layer)),
        pools=pools,
        kv=KvNeed(cpu.block_tokens, cpu.block_bytes * ranks, cpu.max_model_len, cpu.max_num_seqs),
        stream_slots=stream_slots,
    )


def _given(settings: ServeSettings, slots: int | None, sizes: EngineSizes, cpu: CpuSizes) -> Given:
    """Return what the user's flags say of memory, for all workers together."""
    by_slots = settings.expert_slots is not None
    slots_flag = "--expert-slots" if by_slots else "--expert-memory"
    share = cpu.share
    return Given(
        slots,
        None if slots is None else slots_flag,
        None if cpu.kv_bytes is None else sizes.kv_bytes_of_all(cpu.kv_bytes),
        cpu.kv_flag,
        None if share is None else MemoryLimit(share.flag, share.asked_bytes * sizes.num_workers),
    )


def _pool_slots(
    settings: ServeSettings, catalog: PoolCatalog, base_pool: ExpertPool, *, may_stream: bool
) -> PoolSlots:
    """Return the slots per layer that pools need beside the pinned ones.

    A model without pools whose experts may be streamed starts with any number.
    """
    pinned = [named_pool(name, catalog, base_pool) for name in settings.pin]
    pools = list(catalog.pools.values()) or [base_pool]
    sizes = [_slots_of([*pinned, pool]) for pool in pools]
    least = min(sizes)
    if settings.default_pool is not None:
        least = _slots_of([*pinned, named_pool(settings.default_pool, catalog, base_pool)])
    if may_stream and not (catalog.pools or pinned):
        least = 1
    return PoolSlots(least, max(least, *sizes))


def _slots_of(pools: Sequence[ExpertPool]) -> int:
    """Return the slots per layer that hold these pools together."""
    layers = zip(*(pool.expert_ids for pool in pools), strict=True)
    return max(len(set().union(*layer)) for layer in layers)


def _check_host_memory(settings: ServeSettings, slot_bytes: int) -> None:
    if 0 < settings.host_expert_bytes < slot_bytes:
        raise ConfigError(
            f"--host-expert-memory {format_gib(settings.host_expert_bytes)} is too small: one"
            f" expert takes {format_gib(slot_bytes)}; raise it, or leave it out to keep none"
        )


def _load_order(
    settings: ServeSettings,
    catalog: PoolCatalog,
    base_pool: ExpertPool,
    holds_all: bool,
    *,
    is_base_served: bool,
) -> tuple[ExpertPool, ...]:
    """Return the pools to load at start, in order.

    Those are the base pool if it is served, the default pool, the pools of --preload, then all
    others; or --preload's alone if it is given and the slots cannot hold all experts.
    """
    preload, default = settings.preload, settings.default_pool
    wanted: list[str] = [base_pool.name] if is_base_served else []
    if preload is None or holds_all:
        # With all experts in slots, a pool costs only a row, so all pools are loaded.
        wanted += [*single_names([default] if default else []), *(preload or ()), *catalog.pools]
    else:
        wanted += preload
    return tuple(named_pool(name, catalog, base_pool) for name in dict.fromkeys(wanted))


def _rehearse(settings: ServeSettings, plan: StartPlan, slot_bytes: int) -> None:
    """Raise ConfigError if no pool could ever be served, or not the default pool or the pins.

    With stream slots every pool is served, but one that is pinned is to be resident.
    """
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
    if plan.stream_slots:
        return
    pools = (plan.base_pool, *plan.catalog.pools.values(), *plan.pinned, *plan.load_order)
    if settings.default_pool is None:
        if not any(table.fits(pool.expert_ids) for pool in pools):
            raise ConfigError(_nothing_fits(plan, slot_bytes))
        return
    default = named_pool(settings.default_pool, plan.catalog, plan.base_pool)
    if not table.fits(default.expert_ids):
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
    can_shrink = any(pool.has_scores for pool in plan.catalog.pools.values())
    smaller = f", or give --default-experts {plan.num_slots}" if can_shrink else ""
    return (
        f"no pool fits in {plan.num_slots} slots per layer: the smallest, {smallest.name!r}, needs"
        f" {needed}; raise --expert-slots, or --expert-memory to"
        f" {format_gib(slot_bytes * sum(min(needed, count) for count in plan.experts_per_layer))}"
        f"{smaller}"
    )
