"""Streamed pools: what their tokens get, whatever is in the slots and whatever happens to them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.errors import CheckpointError
from emo_serve.residency.slots import SlotTable
from emo_serve.vllm_plugin.moe import PooledExperts
from emo_serve.vllm_plugin.slot_host import SlotHost
from emo_serve.vllm_plugin.streaming import LayerStream
from tests.support.golden.checkpoints import write_checkpoint
from tests.unit.vllm_plugin.test_slot_host import MAX_TOKENS, make_host

pytestmark = pytest.mark.usefixtures("one_rank")

BASE, POOL = 0, 1
LAYERS = (1, 2)  # of 24 and 12 experts; layer 0 is dense
EVERYTHING: tuple[tuple[int, ...], ...] = ((), tuple(range(24)), tuple(range(12)))
POOLS = {
    "a": ((), (0, 1, 2, 3, 4, 22, 23), (0, 1, 2, 11)),
    "b": ((), (3, 4, 5, 6, 22, 23), (0, 3, 4, 5, 11)),
    "c": ((), (7, 8, 9, 22, 23), (0, 6, 7, 11)),
}
NUM_SLOTS = 9


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("dense-first"))


@pytest.fixture
def whole(directory: Path) -> SlotHost:
    """All experts, each in a slot."""
    host = make_host(directory, num_slots=99, holds_all=True)
    list(host.take_experts(load_file(directory / "model.safetensors").items()))
    host.end_start_up(trunk_bytes=0)
    return host


def streaming(directory: Path, stream_slots: int, host_experts: int = 0) -> SlotHost:
    host = make_host(directory, num_slots=NUM_SLOTS, stream_slots=stream_slots)
    host._host_expert_bytes = host_experts * host.shape.num_bytes
    host.open_store(Checkpoint.open(directory))
    host.publish_pool(BASE, EVERYTHING, 1.0)
    return host


class Step:
    """Random tokens, some of the base pool and some of another."""

    def __init__(self, num_tokens: int, num_of_pool: int = 0) -> None:
        self.x_TD = torch.randn(num_tokens, 128) / 4
        self.rows_T = torch.full((num_tokens,), BASE)
        self.rows_T[torch.randperm(num_tokens)[:num_of_pool]] = POOL
        self.logits = [torch.randn(num_tokens, count) * 2 for count in (24, 12)]

    def through(self, host: SlotHost) -> list[Tensor]:
        return [
            host.layers[index].compute(self.x_TD, logits, self.rows_T)
            for index, logits in zip(LAYERS, self.logits, strict=True)
        ]

    def check(self, host: SlotHost, whole: SlotHost) -> None:
        for got, want in zip(self.through(host), self.through(whole), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for layer in host.layers.values():
            assert layer.stream is not None
            layer.stream.check_integrity()


def load(host: SlotHost, number: int, table: SlotTable, name: str) -> Iterator[None]:
    """Load a pool as the front end would; what is yielded to runs beside the load."""
    plan = table.plan_load(name, POOLS[name])
    table.begin(plan)
    host.start_load(number, [(copy.layer, copy.expert, copy.slot) for copy in plan.copies])
    yield
    while host.finish_load(number, POOL, POOLS[name], 1.0).state == "loading":
        pass
    table.finish(name)


@pytest.mark.parametrize("stream_slots", [1, 3, 8, 24])
@pytest.mark.parametrize("num_tokens", [1, 2, MAX_TOKENS])
def test_a_streamed_pool_computes_what_all_experts_in_slots_would(
    directory: Path, whole: SlotHost, stream_slots: int, num_tokens: int
) -> None:
    host = streaming(directory, stream_slots)
    for _ in range(4):
        Step(num_tokens).check(host, whole)


@pytest.mark.parametrize("host_experts", [0, 1, 12])
def test_streams_beside_loads_and_evictions(
    directory: Path, whole: SlotHost, host_experts: int
) -> None:
    """Tokens of both kinds share steps, while slots that were streamed from are written."""
    host, rng = streaming(directory, 3, host_experts), random.Random(host_experts)
    table, resident = SlotTable([0, 24, 12], NUM_SLOTS), ""
    for number in range(1, 25):
        if resident:
            table.evict(resident)
        resident = rng.choice([name for name in POOLS if name != resident])
        for _ in load(host, number, table, resident):
            for _ in range(rng.randrange(3)):
                Step(rng.choice((1, 5))).check(host, whole)
        whole.publish_pool(POOL, POOLS[resident], 1.0)
        for _ in range(rng.randrange(3)):
            Step(6, num_of_pool=3).check(host, whole)
    Step(4, num_of_pool=4).check(host, whole)


def test_what_is_in_a_slot_is_not_read_again(directory: Path, whole: SlotHost) -> None:
    host, step = streaming(directory, 24), Step(1)
    step.check(host, whole)
    read = host.streamed.experts
    assert 0 < read <= 16 and host.streamed.seconds > 0
    step.check(host, whole)
    assert host.streamed.experts == read
    table = SlotTable([0, 24, 12], NUM_SLOTS)
    list(load(host, 1, table, "a"))
    inside = Step(3)
    for index, logits in zip(LAYERS, inside.logits, strict=True):
        others = [e for e in EVERYTHING[index] if e not in POOLS["a"][index]]
        logits[:, others] = -1e9
    inside.check(host, whole)
    assert host.streamed.experts == read, "all that these tokens choose is there for the pool"


def test_the_least_recently_used_makes_room(directory: Path) -> None:
    host = streaming(directory, 8)
    table = SlotTable([0, 24, 12], NUM_SLOTS)
    list(load(host, 1, table, "a"))  # takes seven of nine slots in layer 1: two serve as well
    layer = host.layers[1]
    assert layer.stream is not None

    def reads(*experts: int) -> int:
        """Have one token choose these experts, and return how many were read."""
        before = host.streamed.experts
        logits_TE = torch.full((1, 24), -1e9)
        logits_TE[0, list(experts)] = 1.0
        layer.compute(torch.ones(1, 128), logits_TE, torch.tensor([BASE]))
        return host.streamed.experts - before

    assert layer.moe.top_k - layer.moe.num_shared_experts == 2
    pairs = [(first, first + 1) for first in range(5, 17, 2)]  # of which ten slots hold five
    assert [reads(*pair) for pair in pairs[:5]] == [2] * 5
    assert [reads(*pairs[i]) for i in (0, 5, 0, 1)] == [0, 2, 0, 2]


def test_a_read_that_fails_leaves_no_wrong_expert_behind(
    directory: Path, whole: SlotHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, step = streaming(directory, 3), Step(2)

    def fail(*_: object) -> None:
        raise CheckpointError("the file is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "check_expert", fail)
        with pytest.raises(CheckpointError, match="the file is gone"):
            step.through(host)
    step.check(host, whole)


def test_steps_without_a_streamed_token_do_not_stream(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = streaming(directory, 3)
    list(load(host, 1, SlotTable([0, 24, 12], NUM_SLOTS), "a"))
    monkeypatch.setattr(LayerStream, "mix", None)
    Step(3, num_of_pool=3).through(host)
    with pytest.raises(TypeError, match="not callable"):
        Step(3, num_of_pool=2).through(host)


def test_a_row_given_to_a_pool_that_fits_is_not_streamed(directory: Path) -> None:
    host = streaming(directory, 3)
    rows_T = torch.tensor([POOL])
    layers: list[PooledExperts] = list(host.layers.values())
    streams = [layer.stream for layer in layers if layer.stream is not None]
    host.publish_pool(POOL, EVERYTHING, 2.0)
    assert all(stream.has_streamed(rows_T) for stream in streams)
    list(load(host, 1, SlotTable([0, 24, 12], NUM_SLOTS), "a"))
    assert not any(stream.has_streamed(rows_T) for stream in streams)
