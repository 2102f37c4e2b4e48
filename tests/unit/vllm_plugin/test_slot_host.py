"""A model's slots without an engine: start-up, loads, pools, and the worker calls to them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.config import load_config
from emo_serve.emo.tensor_names import NAMES, expert_tensor_name
from emo_serve.errors import CheckpointError, EmoServeError
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.slots import Copy
from emo_serve.server.coverage import CoverageSum
from emo_serve.server.vllm_adapter.worker_calls import WorkerCalls
from emo_serve.vllm_plugin.backends import ReferenceBackend
from emo_serve.vllm_plugin.batch_pools import PoolRows
from emo_serve.vllm_plugin.contract import LoadProgress, PluginSettings, RequestTag
from emo_serve.vllm_plugin.moe import PooledMoE
from emo_serve.vllm_plugin.packed import ExpertShape
from emo_serve.vllm_plugin.slot_host import SlotHost, slot_host_of
from emo_serve.vllm_plugin.stage import Stage
from emo_serve.vllm_plugin.worker import EmoWorkerExtension
from tests.support.expert_stores import HIDDEN, WIDTH, expected
from tests.support.golden.checkpoints import write_checkpoint
from tests.unit.vllm_plugin.test_contract import through_vllm
from tests.unit.vllm_plugin.test_loads import HeldMover

pytestmark = pytest.mark.usefixtures("one_rank")

POOL = ((), (1, 5, 22, 23), (0, 3, 11))  # 22 and 23, 11: shared; 0, 11: always active
COPIES = [(1, 1, 3), (1, 5, 0), (1, 22, 1), (1, 23, 2), (2, 0, 3), (2, 3, 1), (2, 11, 2)]
NUM_SLOTS, NUM_ROWS, MAX_TOKENS = 4, 2, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one dense layer and two MoE layers of 24 and 12 experts."""
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("dense-first"))


def make_host(
    directory: Path,
    *,
    num_slots: int = NUM_SLOTS,
    holds_all: bool = False,
    stage: Stage | None = None,
    **more: int,
) -> SlotHost:
    config, backend = load_config(directory), ReferenceBackend()
    settings = PluginSettings(num_slots, NUM_ROWS, records_routing=not holds_all, **more)
    here = range(len(config.moe_layers)) if stage is None else stage.layers
    layers = [
        PooledMoE(config.facts, moe, settings, backend, f"layers.{index}")
        if moe is not None and index in here
        else None
        for index, moe in enumerate(config.moe_layers)
    ]
    return SlotHost(
        layers,
        backend,
        ExpertShape(HIDDEN, WIDTH, torch.float32),
        settings,
        torch.device("cpu"),
        names=NAMES,
        holds_all=holds_all,
        max_num_tokens=MAX_TOKENS,
        stage=stage,
    )


@pytest.fixture
def host(directory: Path) -> SlotHost:
    made = make_host(directory)
    made.open_store(Checkpoint.open(directory))
    return made


def settled(host: SlotHost, load_id: int) -> LoadProgress:
    """Ask until the load is not under way any more."""
    while (progress := host.finish_load(load_id, 1, POOL, 0.5)).state == "loading":
        time.sleep(0.001)
    return progress


def check_published(host: SlotHost, directory: Path) -> None:
    """Check that row 1 has the pool, and that its experts are where they were copied to."""
    tensors = load_file(directory / "model.safetensors")
    for index, layer in host.layers.items():
        assert layer.pool_table[1].nonzero()[:, 0].tolist() == list(POOL[index])
        assert float(layer.temperatures[1]) == 0.5
    for index, expert, number in COPIES:
        if index not in host.stage.layers:
            continue
        assert int(host.layers[index].slot_of_expert[expert]) == number
        slot = host.layers[index].slot(number)
        for matrix, want in zip((slot.w13, slot.w2), expected(tensors, index, expert), strict=True):
            assert torch.equal(matrix.values, want.float())


def is_untouched(host: SlotHost) -> bool:
    """Tell whether no table was written."""
    return not any(
        layer.pool_table.any() or layer.slot_of_expert.any() for layer in host.layers.values()
    )


# -- start-up --


@pytest.mark.parametrize("place", [(0, 99), (9, 0)])
def test_an_expert_that_the_model_does_not_have_is_named(
    directory: Path, place: tuple[int, int]
) -> None:
    name = expert_tensor_name(*place, "gate")
    host = make_host(directory, holds_all=True)
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place"):
        list(host.take_experts([(name, torch.zeros(WIDTH, HIDDEN))]))


def test_the_experts_of_other_stages_are_left_to_these(directory: Path) -> None:
    host = make_host(directory, holds_all=True, stage=Stage(1, range(2, 3)))
    names = [expert_tensor_name(layer, 3, "gate") for layer in (1, 2)]
    list(host.take_experts([(name, torch.zeros(WIDTH, HIDDEN)) for name in names]))
    with pytest.raises(CheckpointError, match=f"tensor {expert_tensor_name(3, 3, 'gate')}"):
        list(host.take_experts([(expert_tensor_name(3, 3, "gate"), torch.zeros(1))]))


# -- loads --


def test_a_pool_is_copied_then_published_and_asking_again_changes_nothing(
    host: SlotHost, directory: Path
) -> None:
    places = [tensor.data_ptr() for layer in host.layers.values() for tensor in layer.buffers()]
    host.start_load(7, COPIES)
    progress = settled(host, 7)
    check_published(host, directory)
    read = len(COPIES) * 3 * HIDDEN * WIDTH * 2  # bf16 in the file, fp32 in the slots
    assert progress == LoadProgress(0, "published", None, 7, 2 * read, read, 7, 0)
    assert host.finish_load(7, 1, POOL, 0.5) == progress
    found = [tensor.data_ptr() for layer in host.layers.values() for tensor in layer.buffers()]
    assert found == places, "CUDA graphs need one address"


def test_one_load_at_a_time_and_nothing_is_seen_of_it_before_its_end(host: SlotHost) -> None:
    mover = host._mover = HeldMover()
    host.start_load(1, COPIES)
    with pytest.raises(EmoServeError, match="load 1 is under way; 2 must wait"):
        host.start_load(2, COPIES)
    mover.at_step.acquire()
    progress = host.finish_load(1, 1, POOL, 0.5)
    assert (progress.state, progress.experts_copied) == ("loading", 0) and is_untouched(host)
    with pytest.raises(EmoServeError, match="load 2 is not the last"):
        host.finish_load(2, 1, POOL, 0.5)
    for _ in range(2 * len(COPIES)):
        mover.steps.release()
    assert settled(host, 1).state == "published"


def test_closing_ends_a_load(host: SlotHost) -> None:
    host.close()
    mover = host._mover = HeldMover()
    host.start_load(1, COPIES)
    mover.at_step.acquire()
    for _ in range(2 * len(COPIES)):
        mover.steps.release()
    host.close()
    assert host._load is not None and not host._load._thread.is_alive()


def test_a_failed_load_publishes_nothing(host: SlotHost, directory: Path) -> None:
    path = directory / "model.safetensors"
    whole, times = path.read_bytes(), path.stat()
    try:
        os.truncate(path, len(whole) // 2)
        host.start_load(1, COPIES)
        progress = settled(host, 1)
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert progress.state == "failed" and "bytes" in str(progress.failure)
    assert is_untouched(host)


@pytest.mark.parametrize("copy", [(1, 24, 0), (1, -1, 0), (1, 0, NUM_SLOTS), (2, 0, -1), (0, 0, 0)])
def test_what_does_not_exist_is_not_loaded(host: SlotHost, copy: tuple[int, int, int]) -> None:
    with pytest.raises(LookupError):
        host.start_load(1, [copy])


def test_without_a_store_there_are_no_loads(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="not started with --load-format emo"):
        make_host(directory).start_load(1, COPIES)


# -- start-up --


def test_without_a_front_end_every_expert_comes_with_the_model(directory: Path) -> None:
    host = make_host(directory, num_slots=99, holds_all=True)
    tensors = load_file(directory / "model.safetensors")
    trunk = dict(host.take_experts(tensors.items()))
    assert set(trunk) == {name for name in tensors if ".experts." not in name}
    host.end_start_up(trunk_bytes=5)
    assert host.trunk_bytes == 5 and host.record is None
    for index, layer in host.layers.items():
        assert layer.pool_table[0].all() and not layer.pool_table[1].any()
        assert layer.slot_of_expert.tolist() == list(range(layer.moe.num_experts))
        for expert in range(layer.moe.num_experts):
            slot, wants = layer.slot(expert), expected(tensors, index, expert)
            for matrix, want in zip((slot.w13, slot.w2), wants, strict=True):
                assert torch.equal(matrix.values, want.float())


def test_a_front_end_finds_no_pool_published(host: SlotHost) -> None:
    host.end_start_up(trunk_bytes=5)
    assert is_untouched(host)


def test_an_expert_of_another_shape_is_refused(directory: Path) -> None:
    name = "model.layers.1.mlp.experts.3.{}_proj.weight"
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH - 1)}
    weights = [(name.format(matrix), torch.zeros(shape)) for matrix, shape in shapes.items()]
    host = make_host(directory, num_slots=99, holds_all=True)
    with pytest.raises(CheckpointError, match=r"expert 3 of layer 1 has .*\(128, 63\), expected"):
        list(host.take_experts(weights))


# -- the way from the front end --


class Model(nn.Module):
    """A model of any class: parameters, and a host of slots."""

    def __init__(self, slot_host: SlotHost) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.slot_host = slot_host


def route(host: SlotHost, rows: PoolRows, tag: RequestTag, num_tokens: int) -> None:
    """Stand in for a step of one request, in which the router likes all experts alike."""
    rows.fill([tag], np.array([0, num_tokens]), host.record)
    for layer in host.layers.values():
        assert layer.record is not None
        layer.record.note(torch.zeros(num_tokens, layer.moe.num_experts))


def worker_of(host: SlotHost, rows: PoolRows) -> EmoWorkerExtension:
    model, worker = Model(host), EmoWorkerExtension()
    worker.rank = host.stage.number
    cache = torch.zeros(6, 4)
    worker.model_runner = SimpleNamespace(
        get_model=lambda: model,
        emo_pool_rows=rows,
        kv_caches=[cache[:3], cache[3:], torch.zeros(2)],  # layers may share one memory
    )
    host.end_start_up(trunk_bytes=5)
    return worker


@pytest.mark.parametrize("ends", [(3,), (1, 3), (2, 3)], ids=["one stage", "dense|MoE", "MoE|MoE"])
async def test_the_front_end_reaches_the_slots_through_the_workers(
    directory: Path, ends: tuple[int, ...]
) -> None:
    stages = [Stage(n, range(first, end)) for n, (first, end) in enumerate(pairwise((0, *ends)))]
    hosts = [make_host(directory, stage=stage) for stage in stages]
    for host in hosts:
        host.open_store(Checkpoint.open(directory))
    rows = PoolRows(MAX_TOKENS, NUM_ROWS, torch.device("cpu"))
    workers = [worker_of(host, rows) for host in hosts]

    async def rpc(method: str, args: tuple[Any, ...]) -> Sequence[dict[str, Any]]:
        return [through_vllm(getattr(worker, method)(*args)) for worker in workers]

    calls = WorkerCalls(rpc, lambda: False, lambda experts: None)
    facts = await calls.describe()
    assert (facts.num_slots, facts.trunk_bytes) == ((NUM_SLOTS, NUM_SLOTS), 5)
    assert facts.kv_cache_bytes == 4 * (6 * 4 + 2)
    assert (facts.dtype, facts.expert_dtype) == ("bfloat16", "float32")
    assert facts.moe_backend == "reference" and facts.routes_by_pool and facts.records_routing
    assert facts.slot_bytes_all_ranks == 3 * HIDDEN * WIDTH * 4

    report = await calls.make_resident(1, POOL, 0.5, [Copy(*copy) for copy in COPIES])
    assert report.experts_copied == len(COPIES)
    assert report.bytes_copied == len(COPIES) * 3 * HIDDEN * WIDTH * 4
    await calls.make_resident(0, POOL, 0.5, [])
    for host in hosts:
        check_published(host, directory)
        assert all(layer.pool_table[0].any() for layer in host.layers.values())
        route(host, rows, RequestTag(1, account=9), 3)
        route(host, rows, RequestTag(0, mass_slot=4), 2)
    layers = [layer for layer in load_config(directory).moe_layers if layer is not None]
    shares = [  # of equal logits
        sum(expert < layer.num_standard_experts for expert in ids) / layer.num_standard_experts
        for layer, ids in zip(layers, POOL[1:], strict=True)
    ]
    coverage = await calls.read_coverage()
    assert list(coverage) == [9] and isinstance(coverage[9], CoverageSum)
    assert (coverage[9].mass, coverage[9].tokens) == (pytest.approx(3 * sum(shares) / 2), 3)
    mass = await calls.read_mass(4)
    assert mass.tokens == 2 and list(map(len, mass.layers)) == [0, 24, 12]
    pool = ExpertPool("p", tuple(LayerExperts(ids) if ids else None for ids in POOL), 0.5)
    usage = await calls.usage_of(pool)
    assert usage.tokens == 3 and list(map(len, usage.counts)) == [0, 24, 12]
    assert {e for e, count in enumerate(usage.counts[2]) if count} <= set(POOL[2])


def test_a_model_without_slots_is_a_mistake() -> None:
    with pytest.raises(AttributeError):
        slot_host_of(nn.Linear(1, 1))
