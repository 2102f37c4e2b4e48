"""How memory is divided: what is promised for every machine and model, and single cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.config import GIB
from emo_serve.errors import ConfigError
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

MIB = 2**20
RELEASED = MemoryNeed(  # 16 layers of 128 experts of width 1024, hidden size 2048, in bfloat16
    trunk_bytes=int(1.27 * GIB),
    process_bytes=process_bytes(1),
    host_expert_bytes=0,
    slot_bytes=12 * MIB,
    experts_per_layer=(128,) * 16,
    pools=PoolSlots(16, 32),
    kv=KvNeed(128, 128 * 16 * 2 * 2048 * 2, 4096, 128),
)
NOTHING = Given()


def limits(free: float) -> tuple[MemoryLimit, ...]:
    return (MemoryLimit("test", int(free)), MemoryLimit("more", 2**60))


def plan(free_gib: float, given: Given = NOTHING, need: MemoryNeed = RELEASED) -> MemoryPlan:
    return plan_memory(need, limits(free_gib * GIB), given)


# -- what always holds --

kv_needs = st.builds(
    KvNeed,
    block_tokens=st.sampled_from([16, 32, 128]),
    block_bytes=st.integers(1, 64 * MIB),
    max_model_len=st.integers(1, 2**17),
    max_num_seqs=st.integers(1, 512),
)


@st.composite
def needs(draw: st.DrawFn) -> MemoryNeed:
    experts = tuple(draw(st.lists(st.integers(1, 64), min_size=1, max_size=8)))
    every = draw(st.integers(1, max(experts)))
    return MemoryNeed(
        trunk_bytes=draw(st.integers(1, 4 * GIB)),
        process_bytes=draw(st.integers(0, 2 * GIB)),
        host_expert_bytes=draw(st.integers(0, GIB)),
        slot_bytes=draw(st.integers(1, 64 * MIB)),
        experts_per_layer=experts,
        pools=PoolSlots(draw(st.integers(1, every)), every),
        kv=draw(kv_needs),
    )


def planned(need: MemoryNeed, free: int, given: Given = NOTHING) -> MemoryPlan | None:
    try:
        return plan_memory(need, limits(free), given)
    except ConfigError:
        return None


free_bytes = st.integers(0, 64 * GIB)


@given(needs(), free_bytes)
def test_what_is_planned_fits_and_serves_a_pool_and_a_context(need: MemoryNeed, free: int) -> None:
    result = planned(need, free)
    least = need.fixed_bytes + need.slab_bytes(need.pools.least) + need.kv.least_bytes
    assert (result is None) == (least > free)
    if result is None:
        return
    assert result.total_bytes <= free and result.excess_bytes == 0
    assert need.pools.least <= result.num_slots <= need.most_slots
    assert result.kv_bytes >= need.kv.least_bytes
    left = free - need.fixed_bytes - need.slab_bytes(result.num_slots)
    assert result.kv_bytes <= max(left // 2, need.kv.least_bytes)
    assert result.kv_bytes <= need.kv.useful_bytes


@given(needs(), free_bytes)
def test_all_experts_are_held_if_they_fit_beside_a_useful_cache(
    need: MemoryNeed, free: int
) -> None:
    all_of_it = need.fixed_bytes + need.slab_bytes(need.most_slots) + 2 * need.kv.useful_bytes
    if all_of_it > free:
        return
    result = planned(need, free)
    assert result is not None
    assert (result.num_slots, result.kv_bytes) == (need.most_slots, need.kv.useful_bytes)


@given(needs(), free_bytes)
def test_no_slot_is_wasted(need: MemoryNeed, free: int) -> None:
    result = planned(need, free)
    if result is None or result.num_slots == need.most_slots:
        return
    one_more = need.fixed_bytes + need.slab_bytes(result.num_slots + 1)
    assert one_more + 2 * need.kv.useful_bytes > free
    if result.num_slots < need.pools.every:
        assert one_more + need.kv.least_bytes > free


@given(needs(), free_bytes, st.integers(0, 8 * GIB))
def test_more_memory_never_gives_less(need: MemoryNeed, free: int, more: int) -> None:
    before, after = planned(need, free), planned(need, free + more)
    if before is None:
        return
    assert after is not None and after.num_slots >= before.num_slots
    fixed = Given(slots=before.num_slots, slots_flag="--expert-slots")
    small, large = planned(need, free, fixed), planned(need, free + more, fixed)
    assert small is not None and large is not None
    assert small.kv_bytes == before.kv_bytes <= large.kv_bytes


@given(needs(), free_bytes, st.integers(1, 64), st.integers(1, 4 * GIB))
def test_what_the_user_gives_is_taken_as_it_is(
    need: MemoryNeed, free: int, slots: int, kv_bytes: int
) -> None:
    slots = min(slots, need.most_slots)
    both = planned(need, free, Given(slots, "--expert-slots", kv_bytes, "--kv-cache-memory-bytes"))
    assert both is not None and (both.num_slots, both.kv_bytes) == (slots, kv_bytes)
    assert both.excess_bytes == max(0, both.total_bytes - free)
    one = planned(need, free, Given(slots, "--expert-slots"))
    if one is not None:
        assert one.num_slots == slots and one.total_bytes <= free
    other = planned(need, free, Given(None, None, kv_bytes, "--kv-cache-memory-bytes"))
    if other is not None:
        assert other.kv_bytes == kv_bytes and other.total_bytes <= free


@given(needs(), st.integers(1, 64 * GIB), st.integers(1, 64 * GIB))
def test_a_share_is_used_up_and_not_exceeded(need: MemoryNeed, free: int, share: int) -> None:
    result = planned(need, free, Given(share=MemoryLimit("--gpu-memory-utilization 0.5", share)))
    if result is not None:
        assert result.total_bytes == share <= free


# -- the released size --


def test_a_machine_with_room_holds_all_experts_and_four_contexts() -> None:
    result = plan(64)
    assert (result.num_slots, result.slots_flag, result.kv_flag) == (128, None, None)
    assert result.kv_bytes == (4 * 32 + 1) * RELEASED.kv.block_bytes
    assert result.limit == MemoryLimit("test", 64 * GIB)


def test_24_gib_hold_as_many_slots_as_leave_a_useful_cache() -> None:
    result = plan(22)
    slab = RELEASED.slab_bytes(result.num_slots)
    left = 22 * GIB - RELEASED.fixed_bytes - slab
    assert 2 * RELEASED.kv.useful_bytes <= left
    assert left - 2 * RELEASED.kv.useful_bytes < 16 * RELEASED.slot_bytes
    assert 32 < result.num_slots < 128


def test_a_small_machine_holds_what_every_pool_needs_and_a_smaller_cache() -> None:
    result = plan(10.5)
    assert result.num_slots == 32
    assert RELEASED.kv.least_bytes <= result.kv_bytes < RELEASED.kv.useful_bytes


def test_a_smaller_one_serves_the_smaller_pools() -> None:
    result = plan(8)
    assert 16 <= result.num_slots < 32
    assert result.kv_bytes == RELEASED.kv.least_bytes


def test_too_little_memory_is_an_error_with_the_sum_and_what_helps() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(6)
    message = str(refusal.value)
    assert message.startswith("the memory is too small: trunk 1.27 GiB + slab 3.00 GiB (16 slots")
    assert "+ KV cache 0.52 GiB" in message
    assert "and 6.00 GiB is free (test); lower --max-model-len, give smaller --pools" in message
    assert "\n" not in message


def test_the_remedy_is_to_change_what_was_given() -> None:
    flags = Given(slots=64, slots_flag="--expert-memory")
    with pytest.raises(ConfigError, match="lower --max-model-len, lower --expert-memory, or free"):
        plan(8, flags)
    flags = Given(kv_bytes=20 * GIB, kv_flag="VLLM_CPU_KVCACHE_SPACE")
    with pytest.raises(ConfigError, match="lower VLLM_CPU_KVCACHE_SPACE, give smaller --pools"):
        plan(20, flags)


def test_host_memory_for_experts_counts() -> None:
    need = replace(RELEASED, host_expert_bytes=4 * GIB)
    assert plan(22).num_slots > plan(22, need=need).num_slots
    with pytest.raises(
        ConfigError, match=r"host memory for experts 4\.00 GiB = .* lower --host-exp"
    ):
        plan(8, need=need)


def test_a_share_that_is_too_small_is_refused() -> None:
    share = Given(share=MemoryLimit("--gpu-memory-utilization 0.1", 2 * GIB))
    with pytest.raises(ConfigError, match=r"too small: .* raise --gpu-memory-utilization 0\.1, or"):
        plan(20, share)


def test_a_share_above_what_is_free_is_refused() -> None:
    share = Given(share=MemoryLimit("--gpu-memory-utilization 0.92", 22 * GIB))
    with pytest.raises(ConfigError, match=r"0\.92 is 22\.00 GiB, and 20\.00 GiB is free \(test\)"):
        plan(20, share)


def test_where_no_limit_is_known_everything_is_held() -> None:
    result = plan_memory(RELEASED, (), NOTHING)
    assert (result.num_slots, result.kv_bytes) == (128, RELEASED.kv.useful_bytes)
    assert result.limit is None and result.excess_bytes == 0 and "free" not in result.account()


def test_a_small_model_gets_a_cache_for_its_batch_and_not_gigabytes() -> None:
    kv = KvNeed(block_tokens=128, block_bytes=128 * 3072, max_model_len=1024, max_num_seqs=128)
    assert kv.useful_bytes == (1024 + 1) * kv.block_bytes < 400 * MIB
    assert replace(kv, max_num_seqs=100_000).useful_bytes == 512 * MIB
