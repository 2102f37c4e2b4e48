"""The start-up plan: slots, order and refusals, from files of a real (random) checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import models as tiny
from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.config import GIB, ServeSettings
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import ConfigError
from emo_serve.families.opening import open_checkpoint
from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.startup.machine_memory import MemoryLimit
from emo_serve.server.startup.plan import StartPlan, make_plan
from emo_serve.server.vllm_adapter.sizes import CpuSizes, EngineSizes, MemoryShare
from tests.support.golden.checkpoints import pools_of, write_checkpoint

SLOT_BYTES = 3 * 128 * 64 * 4  # float32
TOP_K = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint("shared1", tmp_path_factory.mktemp("shared1")))


@pytest.fixture(scope="module")
def pools_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pools")
    for name, layers in pools_of("shared1").items():
        if name in ("math", "code", "law"):
            entries = tuple(LayerExperts(tuple(experts)) for experts in layers)
            write_pool(ExpertPool(name, entries), directory / f"{name}.json")
    return directory


def plan_of(checkpoint: ModelCheckpoint, settings: ServeSettings, **changes: Any) -> StartPlan:
    return make_plan(
        replace(settings, **changes), checkpoint, ["emo"], EngineSizes(4, 1), persists=True
    )


@pytest.fixture
def settings(pools_dir: Path) -> ServeSettings:
    return ServeSettings(pools_dir=pools_dir)


def order(plan: StartPlan) -> list[str]:
    return [pool.name for pool in plan.load_order]


def test_without_limits_the_base_pool_leads_and_every_pool_follows(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = plan_of(checkpoint, settings)
    assert plan.num_slots == 32
    assert order(plan) == ["base", "code", "law", "math"]
    assert plan.experts_per_layer == (32, 32, 32)


def test_without_pools_the_model_is_served_whole(checkpoint: Checkpoint) -> None:
    assert order(plan_of(checkpoint, ServeSettings())) == ["base"]


# -- a dense model --


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelCheckpoint:
    return open_checkpoint(tiny.write_checkpoint("dense", tmp_path_factory.mktemp("dense")))


def test_a_dense_model_has_the_base_pool_and_no_slots(dense: ModelCheckpoint) -> None:
    plan = plan_of(dense, ServeSettings())
    assert (order(plan), plan.experts_per_layer) == (["base"], (0, 0, 0))
    cpu = CpuSizes(128, 2**20, 512, 16, None, None, None, ())
    limits = [MemoryLimit("machine", 4 * GIB)]
    sizes = EngineSizes(4, 1, cpu)
    planned = make_plan(ServeSettings(), dense, ["dense"], sizes, limits, persists=True)
    assert planned.memory is not None
    assert planned.memory.num_slots == 0 and planned.memory.need.slab_bytes(0) == 0


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--expert-slots", {"expert_slots": 4}),
        ("--expert-memory", {"expert_memory_bytes": GIB}),
        ("--stream-slots", {"stream_slots": 4}),
        ("--host-expert-memory", {"host_expert_bytes": GIB}),
        ("--default-experts", {"default_experts": 4}),
        ("--pools", {"pools_dir": Path(__file__).parent}),
    ],
)
def test_flags_about_experts_are_refused_for_a_dense_model(
    dense: ModelCheckpoint, flag: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: .* is dense: it has no experts.*leave"):
        plan_of(dense, ServeSettings(), **changes)


def test_fewer_slots_leave_the_base_pool_out(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = plan_of(checkpoint, settings, expert_slots=20)
    assert (plan.num_slots, order(plan)) == (20, ["code", "law", "math"])


def test_memory_is_turned_into_slots_of_the_dtype_and_the_device(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    memory = replace(settings, expert_memory_bytes=3 * 20 * SLOT_BYTES)
    assert make_plan(memory, checkpoint, ["emo"], EngineSizes(4, 1), persists=True).num_slots == 20
    assert make_plan(memory, checkpoint, ["emo"], EngineSizes(2, 1), persists=True).num_slots == 32
    assert make_plan(memory, checkpoint, ["emo"], EngineSizes(4, 2), persists=True).num_slots == 32


@pytest.mark.parametrize(
    ("ranks", "slot_bytes"),
    [(1, 3 * 128 * 64 + 4 * (2 * 64 + 128)), (2, 3 * 128 * 32 + 4 * (2 * 32 + 128))],
)
def test_memory_holds_the_scales_of_fp8_experts_too(
    checkpoint: Checkpoint, settings: ServeSettings, ranks: int, slot_bytes: int
) -> None:
    fp8 = replace(settings, expert_dtype="fp8_e4m3")
    for less, slots in ((0, 20), (1, 19)):
        memory = replace(fp8, expert_memory_bytes=3 * 20 * slot_bytes - less)
        for dtype_bytes in (2, 4):
            plan = make_plan(
                memory, checkpoint, ["emo"], EngineSizes(dtype_bytes, ranks), persists=True
            )
            assert plan.num_slots == slots
    host = replace(fp8, host_expert_bytes=slot_bytes - 1)
    with pytest.raises(ConfigError, match="--host-expert-memory .*is too small: one expert"):
        make_plan(host, checkpoint, ["emo"], EngineSizes(4, ranks), persists=True)


def test_preload_decides_which_pools_and_in_which_order(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = plan_of(checkpoint, settings, expert_slots=20, preload=("math", "law"))
    assert order(plan) == ["math", "law"]


def test_nothing_need_be_loaded_at_start(checkpoint: Checkpoint, settings: ServeSettings) -> None:
    plan = plan_of(checkpoint, settings, expert_slots=16, preload=(), default_pool="law")
    assert order(plan) == []


def test_pinned_and_preferred_pools_are_named_by_their_flags(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = plan_of(checkpoint, settings, pin=("law",), preload=("math", "code"))
    assert [pool.name for pool in plan.pinned] == ["law"]
    hashes = {plan.catalog.resolve(name).content_hash for name in ("math", "code")}
    assert plan.preferred == hashes
    assert plan_of(checkpoint, settings).preferred == frozenset()


def test_only_the_operators_own_directory_is_written_to(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    assert plan_of(checkpoint, settings).catalog.persists
    shipped = make_plan(settings, checkpoint, ["emo"], EngineSizes(4, 1), persists=False)
    assert not shipped.catalog.persists


def test_with_room_for_all_preload_leaves_no_pool_out(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = plan_of(checkpoint, settings, preload=("math",))
    assert order(plan) == ["base", "math", "code", "law"]


def test_the_default_pool_is_loaded_first(checkpoint: Checkpoint, settings: ServeSettings) -> None:
    plan = plan_of(checkpoint, settings, expert_slots=16, default_pool="law")
    assert order(plan)[0] == "law"
    assert plan.names.default_pool == "law"
    both = plan_of(checkpoint, settings, expert_slots=24, default_pool="math+code")
    assert order(both)[:2] == ["math", "code"]


@pytest.fixture
def scored_dir(pools_dir: Path, tmp_path: Path) -> Path:
    """The three pools, and one with scores that lists 12 experts per layer."""
    shutil.copytree(pools_dir, tmp_path / "scored")
    layer = LayerExperts(tuple(range(12)), tuple(float(-expert) for expert in range(32)))
    write_pool(ExpertPool("sums", (layer,) * 3), tmp_path / "scored" / "sums.json")
    return tmp_path / "scored"


def test_flags_may_name_sizes(
    checkpoint: Checkpoint, settings: ServeSettings, scored_dir: Path
) -> None:
    settings = replace(settings, pools_dir=scored_dir, expert_slots=24)
    plan = plan_of(
        checkpoint, settings, pin=("sums@3",), preload=("sums@5",), default_pool="sums@4+law"
    )
    assert [pool.name for pool in plan.pinned] == ["sums@3"]
    assert order(plan) == ["sums@5"]
    assert plan.names.choose(None) == "law+sums@4"
    assert plan.preferred == {plan.catalog.resolve("sums@5").content_hash}
    rest = plan_of(checkpoint, settings, default_pool="sums@4+law")
    assert order(rest) == ["sums@4", "law", "code", "math", "sums"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pin": ("nope@4",)}, "--pin: there is no pool 'nope@4'; the pools are: code, law"),
        (
            {"pin": ("sums@33",)},
            "--pin: there is no pool 'sums@33': the sizes of pool 'sums' are 1",
        ),
        ({"preload": ("law@4",)}, "--preload: there is no pool 'law@4': pool 'law' has no scores"),
        ({"default_pool": "law+sums@33"}, "--default-pool: there is no pool 'sums@33'"),
        ({"default_pool": "base@4"}, "--default-pool: there is no pool 'base@4'"),
        (
            {"default_pool": "sums@12", "expert_slots": 11},
            "--default-pool sums@12 does not fit in 11 slots",
        ),
        (
            {"default_experts": 33},
            "--default-experts is 33; give a number from 1, the experts that",
        ),
    ],
)
def test_a_size_there_is_not_is_refused_at_start(
    checkpoint: Checkpoint,
    settings: ServeSettings,
    scored_dir: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(checkpoint, settings, **{"pools_dir": scored_dir, "default_experts": 8} | changes)
    assert message in str(refusal.value)


def test_the_default_size_decides_what_is_loaded_and_what_fits(
    checkpoint: Checkpoint,
    settings: ServeSettings,
    scored_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = replace(settings, pools_dir=scored_dir, expert_slots=4)
    with pytest.raises(ConfigError, match="no pool fits in 4 slots.*, or give --default-experts 4"):
        plan_of(checkpoint, settings)
    for named in ({"default_pool": "sums@4"}, {"pin": ("sums@4",)}, {"preload": ("sums@4",)}):
        assert plan_of(checkpoint, settings, **named).num_slots == 4
    assert not caplog.messages
    plan = plan_of(checkpoint, settings, default_experts=4)
    assert plan.catalog.pools["sums"].expert_ids == ((0, 1, 2, 31),) * 3
    assert plan.catalog.resolve("sums@6").expert_ids == ((0, 1, 2, 3, 4, 31),) * 3
    assert caplog.messages == [
        "--default-experts does not apply to pools without scores, which keep the experts of their"
        " files: code, law, math"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preload": ("nope",)}, "--preload: there is no pool 'nope'; the pools are: code, law"),
        ({"default_pool": "nope"}, "--default-pool: there is no pool 'nope'"),
        ({"default_pool": "math+nope"}, "--default-pool: there is no pool 'nope'"),
        ({"expert_slots": 33}, "--expert-slots is 33; a layer has at most 32"),
        ({"expert_slots": 4}, "no pool fits in 4 slots per layer: the smallest, 'code', needs"),
        ({"expert_slots": 20, "default_pool": "base"}, "--default-pool base does not fit in 20"),
        ({"pin": ("nope",)}, "--pin: there is no pool 'nope'"),
        ({"expert_slots": 16, "pin": ("math", "law")}, "--pin math,law: these pools do not fit"),
        (
            {"expert_slots": 16, "default_pool": "law", "pin": ("math",)},
            "--default-pool law does not fit in 16 slots per layer beside the pinned pools",
        ),
        ({"host_expert_bytes": SLOT_BYTES - 1}, "--host-expert-memory"),
        ({"pools_dir": None, "expert_slots": 20}, "20 slots per layer cannot hold the base pool"),
    ],
)
def test_a_start_that_could_serve_nothing_asked_for_is_refused(
    checkpoint: Checkpoint, settings: ServeSettings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(checkpoint, settings, **changes)
    assert message in str(refusal.value)


def test_a_pool_called_like_the_model_is_refused(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = make_plan(settings, checkpoint, ["math"], EngineSizes(4, 1), persists=True)
    assert order(plan) == ["base", "code", "law"]
    assert "--served-model-name" in str(plan.catalog.refused[0])


def test_a_pool_with_a_name_that_is_kept_costs_only_itself(
    checkpoint: Checkpoint, settings: ServeSettings, pools_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(pools_dir, tmp_path, dirs_exist_ok=True)
    for name in ("base", "auto", "emo"):
        text = (pools_dir / "law.json").read_text()
        (tmp_path / f"{name}-file.json").write_text(text.replace('"law"', f'"{name}"'))
    plan = plan_of(checkpoint, settings, pools_dir=tmp_path)
    assert order(plan) == ["base", "code", "law", "math"]
    assert [str(error) for error in plan.catalog.refused] == [
        f"{tmp_path}/auto-file.json: pool name 'auto' is kept for the server's own choice of a"
        " pool; rename the pool",
        f"{tmp_path}/base-file.json: pool name 'base' is kept for all experts of the model; rename"
        " the pool",
        f"{tmp_path}/emo-file.json: pool 'emo' has the name of the model; give the model another"
        " with --served-model-name",
    ]


def test_a_bad_pool_file_costs_only_its_own_pool(
    checkpoint: Checkpoint, settings: ServeSettings, tmp_path: Path
) -> None:
    assert settings.pools_dir is not None
    for file in settings.pools_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.json").write_text("{")
    plan = plan_of(checkpoint, settings, pools_dir=tmp_path)
    assert order(plan) == ["base", "code", "law", "math"]
    assert "broken.json" in str(plan.catalog.refused[0])


def test_the_golden_checkpoint_is_what_the_tests_assume(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert 3 * config.hidden_size * config.intermediate_size * 4 == SLOT_BYTES


@pytest.mark.parametrize("temperature", ["1e39", "1e-40", "1e400", "NaN"])
def test_a_pool_that_cannot_be_held_costs_one_pool_and_not_the_server(
    checkpoint: Checkpoint, settings: ServeSettings, tmp_path: Path, temperature: str
) -> None:
    assert settings.pools_dir is not None
    shutil.copytree(settings.pools_dir, tmp_path / "pools")
    text = (settings.pools_dir / "math.json").read_text().replace('"math"', '"hot"', 1)
    hot = tmp_path / "pools" / "hot.json"
    hot.write_text(text.replace("{", f'{{ "router_temperature": {temperature},', 1))
    plan = plan_of(checkpoint, replace(settings, pools_dir=tmp_path / "pools"))
    assert list(plan.catalog.pools) == ["code", "law", "math"]
    (refused,) = plan.catalog.refused
    assert str(refused).startswith(f"{hot}: router_temperature is")


# -- memory on a CPU --

CPU = CpuSizes(
    block_tokens=128,
    block_bytes=128 * 3 * 2 * 128 * 4,
    max_model_len=512,
    max_num_seqs=128,
    kv_flag=None,
    kv_bytes=None,
    share=None,
    nodes=(0,),
)


def cpu_plan(
    checkpoint: Checkpoint,
    settings: ServeSettings,
    slots_that_fit: int | None,
    cpu: CpuSizes = CPU,
    num_ranks: int = 1,
    **changes: Any,
) -> StartPlan:
    """Plan on a machine that has room for so many slots beside the least KV cache."""
    settings = replace(settings, **changes)
    sizes = EngineSizes(4, num_ranks, cpu)
    names = ["emo"]
    roomy = make_plan(settings, checkpoint, names, sizes, persists=True).memory
    assert roomy is not None
    free = roomy.need.fixed_bytes + roomy.need.slab_bytes(slots_that_fit or 0)
    free += roomy.need.kv.least_bytes
    limits = () if slots_that_fit is None else (MemoryLimit("test", free),)
    return make_plan(settings, checkpoint, names, sizes, limits, persists=True)


def test_only_a_cpus_memory_is_planned(checkpoint: Checkpoint, settings: ServeSettings) -> None:
    assert plan_of(checkpoint, settings).memory is None
    tight = (MemoryLimit("test", 1),)
    sizes = EngineSizes(4, 1)
    plan = make_plan(settings, checkpoint, ["emo"], sizes, tight, persists=True)
    assert (plan.memory, plan.num_slots) == (None, 32)


def test_what_a_start_needs_comes_from_headers_and_flags(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    host = replace(settings, host_expert_bytes=GIB)
    memory = cpu_plan(checkpoint, host, None).memory
    assert memory is not None
    trunk = sum(checkpoint.tensor(name).numel() for name in checkpoint.trunk_names())
    need = memory.need
    assert (need.trunk_bytes, need.host_expert_bytes) == (4 * trunk, GIB)
    assert (need.slot_bytes, need.experts_per_layer) == (SLOT_BYTES, (32, 32, 32))
    assert need.kv.block_bytes == CPU.block_bytes
    assert (memory.num_slots, memory.slots_flag, memory.kv_flag) == (32, None, None)


@pytest.mark.parametrize(("trunk_bytes", "is_long"), [(2**20, False), (2**30, True)])
def test_a_large_trunk_makes_long_steps(
    checkpoint: Checkpoint, settings: ServeSettings, trunk_bytes: int, is_long: bool
) -> None:
    plan = cpu_plan(checkpoint, settings, None)
    assert plan.memory is not None
    need = replace(plan.memory.need, trunk_bytes=trunk_bytes)
    assert replace(plan, memory=replace(plan.memory, need=need)).has_long_steps == is_long
    assert not plan_of(checkpoint, settings).has_long_steps, "a GPU's steps need no cores"


def test_stages_share_out_layers_and_not_experts(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    one = cpu_plan(checkpoint, settings, None).memory
    settings = replace(settings, host_expert_bytes=GIB)
    staged = EngineSizes(4, 1, CPU, (2, 1))
    two = make_plan(settings, checkpoint, ["emo"], staged, persists=True).memory
    assert one is not None and two is not None
    assert two.need.slot_bytes == one.need.slot_bytes
    assert two.need.kv.block_bytes == one.need.kv.block_bytes
    assert two.need.process_bytes > one.need.process_bytes
    assert two.need.host_expert_bytes == 2 * GIB


def test_all_workers_needs_are_added_up(checkpoint: Checkpoint, settings: ServeSettings) -> None:
    one = cpu_plan(checkpoint, settings, None).memory
    two = cpu_plan(checkpoint, settings, None, num_ranks=2).memory
    assert one is not None and two is not None
    assert two.need.slot_bytes == one.need.slot_bytes
    assert two.need.kv.block_bytes == 2 * one.need.kv.block_bytes
    assert two.need.process_bytes > one.need.process_bytes


@pytest.mark.parametrize(
    ("changes", "least", "every"),
    [
        ({}, 12, 16),
        ({"default_pool": "law"}, 16, 16),
        ({"default_pool": "math+law"}, 23, 23),
        ({"pin": ("math",)}, 12, 23),
        ({"pin": ("math",), "default_pool": "code"}, 20, 23),
        ({"pin": ("base",)}, 32, 32),
        ({"pools_dir": None}, 1, 32),
        ({"pools_dir": None, "stream_slots": 0}, 32, 32),
    ],
)
def test_pools_say_how_many_slots_are_needed(
    checkpoint: Checkpoint,
    settings: ServeSettings,
    changes: dict[str, Any],
    least: int,
    every: int,
) -> None:
    memory = cpu_plan(checkpoint, settings, None, **changes).memory
    assert memory is not None
    assert (memory.need.pools.least, memory.need.pools.every) == (least, every)


def test_what_fits_decides_which_pools_are_loaded(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = cpu_plan(checkpoint, settings, 16)
    assert (plan.num_slots, order(plan)) == (16, ["base", "code", "law", "math"])
    assert cpu_plan(checkpoint, settings, 13).num_slots == 13
    for slots in (11, 0):
        with pytest.raises(ConfigError, match=r"the memory is too small: .*free \(test\)"):
            cpu_plan(checkpoint, settings, slots)


def test_what_does_not_fit_is_streamed_on_a_cpu(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    """Beside the slots that the user gives, since pools are meant to fit in these."""
    plan = cpu_plan(checkpoint, settings, None, expert_slots=20)
    assert (plan.num_slots, plan.stream_slots) == (20, TOP_K) and order(plan)[0] == "base"
    assert plan.memory is not None and plan.memory.need.slab_bytes(20) == 3 * 24 * SLOT_BYTES
    assert "20 slots per layer and 4 to stream" in plan.memory.account()
    few = cpu_plan(checkpoint, settings, None, expert_slots=4, stream_slots=1, default_pool="base")
    assert (few.num_slots, few.stream_slots) == (4, 1)
    for whole in ({}, {"expert_slots": 32, "stream_slots": 9}):
        plan = cpu_plan(checkpoint, settings, None, **whole)
        assert (plan.num_slots, plan.stream_slots) == (32, 0)
        assert plan.memory is not None and plan.memory.need.slab_bytes(32) == 96 * SLOT_BYTES


def test_without_pools_any_number_of_slots_is_enough_to_stream(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = cpu_plan(checkpoint, settings, 2, pools_dir=None)
    assert (plan.num_slots, plan.stream_slots, order(plan)) == (2, TOP_K, ["base"])
    with pytest.raises(ConfigError, match="the memory is too small"):
        cpu_plan(checkpoint, settings, 2, pools_dir=None, stream_slots=0)


def test_without_stream_slots_a_pool_must_fit(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    plan = cpu_plan(checkpoint, settings, None, expert_slots=20, stream_slots=0)
    assert plan.stream_slots == 0 and order(plan) == ["code", "law", "math"]
    with pytest.raises(ConfigError, match="--default-pool base does not fit in 20"):
        cpu_plan(checkpoint, settings, None, expert_slots=20, stream_slots=0, default_pool="base")
    with pytest.raises(ConfigError, match="--pin base: these pools do not fit together in 20"):
        cpu_plan(checkpoint, settings, None, expert_slots=20, pin=("base",))


def test_stream_slots_that_cannot_be_are_refused(
    checkpoint: Checkpoint, settings: ServeSettings
) -> None:
    few = replace(settings, expert_slots=20, stream_slots=2)
    with pytest.raises(ConfigError, match="--stream-slots 2: on CUDA .* captured graphs.*leave it"):
        plan_of(checkpoint, few)
    assert plan_of(checkpoint, replace(few, stream_slots=None)).stream_slots == 0
    with pytest.raises(ConfigError, match="--moe-backend triton cannot stream"):
        cpu_plan(checkpoint, few, None, moe_backend="triton")
    with pytest.raises(ConfigError, match="--stream-slots is 33; a layer has at most 32 experts"):
        cpu_plan(checkpoint, few, None, stream_slots=33)


def test_flags_leave_less_to_plan(checkpoint: Checkpoint, settings: ServeSettings) -> None:
    by_slots = cpu_plan(checkpoint, settings, 20, expert_slots=14).memory
    assert by_slots is not None and by_slots.slots_flag == "--expert-slots"
    by_size = cpu_plan(checkpoint, settings, 20, expert_memory_bytes=3 * 14 * SLOT_BYTES)
    assert by_size.memory is not None and by_size.memory.slots_flag == "--expert-memory"
    assert by_slots.num_slots == by_size.num_slots == 14
    cache = replace(CPU, kv_flag="--kv-cache-memory-bytes", kv_bytes=10 * CPU.block_bytes)
    for ranks in (1, 2):
        memory = cpu_plan(checkpoint, settings, 32, cache, ranks).memory
        assert memory is not None and memory.kv_flag == "--kv-cache-memory-bytes"
        assert memory.kv_bytes == ranks * 10 * CPU.block_bytes
    share = replace(CPU, share=MemoryShare("--gpu-memory-utilization 0.5", 3 * GIB, 4 * GIB))
    memory = cpu_plan(checkpoint, settings, None, share).memory
    assert memory is not None and memory.total_bytes == 3 * GIB
