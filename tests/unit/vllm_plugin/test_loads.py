"""Background loads on stand-ins for the slab: order, pieces, failures, the thread's place."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emo_serve.vllm_plugin.backends import MoeBackend, ReferenceBackend, TritonFp8Backend
from emo_serve.vllm_plugin.expert_store import ExpertStore
from emo_serve.vllm_plugin.loads import CpuMover, CudaMover, ExpertLoad, SlotCopy
from emo_serve.vllm_plugin.pacing import Steps
from tests.support.expert_stores import are_equal, expected, make_store, packed, slots_of
from tests.support.fake_cuda import pretend_streams
from tests.support.golden.checkpoints import write_checkpoint

BACKENDS = (ReferenceBackend(), TritonFp8Backend())
COPIES = [(0, 3, 2), (1, 7, 0), (2, 1, 3)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("shared1"))


@pytest.fixture
def store(directory: Path) -> ExpertStore:
    return make_store(directory)[0]


class HeldMover:
    """Take one step each time the test lets it; fail when the test has set why."""

    pacer = None

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.at_step = threading.Semaphore(0)
        self.heard: list[object] = []
        self.failure: Exception | None = None
        self.modes: list[bool] = []

    def begin(self) -> None:
        self.heard.append("begin")

    def move(self, copy: SlotCopy) -> Iterator[None]:
        for step in range(2):
            self.at_step.release()
            self.steps.acquire()
            if self.failure is not None:
                raise self.failure
            self.modes.append(torch.is_inference_mode_enabled())
            self.heard.append((copy, step))
            yield

    def end(self) -> None:
        self.heard.append("end")

    def join(self) -> None:
        self.heard.append("join")


def finish(load: ExpertLoad) -> ExpertLoad:
    load._thread.join(30)
    assert not load._thread.is_alive()
    return load


def test_a_load_goes_in_order_and_is_published_once(store: ExpertStore) -> None:
    mover = HeldMover()
    load = ExpertLoad(4, COPIES, mover, store)
    for _ in range(5):
        mover.steps.release()
    for _ in range(6):
        mover.at_step.acquire()  # the last step is held: nothing says that the load is done
    assert (load.state, load.experts_copied) == ("loading", 2)
    mover.steps.release()
    finish(load)
    assert (load.state, load.experts_copied, load.failure) == ("copied", 3, None)
    published: list[object] = []
    load.publish(published.extend)
    assert load.state == "published" and published == COPIES
    assert mover.heard == ["begin", *((c, s) for c in COPIES for s in (0, 1)), "end", "join"]
    assert all(mover.modes), "a thread has an inference mode of its own"


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyError("x")])
def test_a_failure_midway_is_told(store: ExpertStore, error: Exception) -> None:
    mover = HeldMover()
    load = ExpertLoad(4, COPIES, mover, store)
    for _ in range(2):
        mover.at_step.acquire()
        mover.steps.release()
    mover.at_step.acquire()
    mover.failure = error
    mover.steps.release()
    finish(load)
    assert (load.state, load.experts_copied) == ("failed", 1)
    assert load.failure == f"{type(error).__name__}: {error}"
    assert mover.heard[-1] == "end", "no copy is under way, and nothing is published"


def test_stopping_ends_a_load_at_its_next_piece(store: ExpertStore) -> None:
    mover = HeldMover()
    load = ExpertLoad(4, COPIES, mover, store)
    mover.at_step.acquire()
    stopper = threading.Thread(target=load.stop)
    stopper.start()
    while not load._stopping:
        pass
    mover.steps.release()
    stopper.join(30)
    assert load.state == "failed" and load.experts_copied == 0
    load.stop()  # a second time does nothing


# -- on memory --


@pytest.mark.parametrize("host_experts", [0, 1, 8])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_experts_arrive_in_their_slots_and_nowhere_else(
    directory: Path, monkeypatch: pytest.MonkeyPatch, backend: MoeBackend, host_experts: int
) -> None:
    monkeypatch.setattr(CpuMover, "piece_bytes", 1000)
    store, shape = make_store(directory, backend=backend, host_experts=host_experts)
    tensors = load_file(directory / "model.safetensors")
    for _ in range(2):  # the second time from host memory, if there is enough
        slab = shape.slab(5)
        load = finish(ExpertLoad(1, COPIES, CpuMover(store, slots_of(slab), Steps()), store))
        assert load.state == "copied", load.failure
        for layer, expert, slot in COPIES:
            want = packed(backend, shape, expected(tensors, layer, expert))
            assert are_equal(slab.slot(slot), want)
        untouched = shape.slab(1).slot(0)
        assert all(are_equal(slab.slot(slot), untouched) for slot in (1, 4))
    hits = 3 if host_experts == 8 else 0
    assert load.counts.host_hits == hits and load.counts.disk_reads == 3 - hits
    assert store.counts.disk_reads == 6 - hits


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_streams(monkeypatch)


@pytest.mark.parametrize("host_experts", [0, 8])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_all_of_an_expert_goes_through_pinned_memory(
    fake_cuda: None, directory: Path, backend: MoeBackend, host_experts: int
) -> None:
    store, shape = make_store(directory, backend=backend, host_experts=host_experts)
    slab = shape.slab(5)
    mover = CudaMover(store, slots_of(slab), shape, torch.device("cuda"))
    load = finish(ExpertLoad(1, COPIES, mover, store))
    assert load.state == "copied", load.failure
    tensors = load_file(directory / "model.safetensors")
    for layer, expert, slot in COPIES:
        want = packed(backend, shape, expected(tensors, layer, expert))
        assert are_equal(slab.slot(slot), want)


def test_a_load_rests_only_while_others_decode(directory: Path) -> None:
    store, shape = make_store(directory)
    steps, rests = Steps(), list[float]()
    mover = CpuMover(store, slots_of(shape.slab(5)), steps)
    mover.pacer._sleep = rests.append
    mover.pacer._work_clock = iter(range(10_000)).__next__  # each look is a second later
    assert finish(ExpertLoad(1, COPIES, mover, store)).state == "copied"
    assert not rests
    steps.begin()
    assert finish(ExpertLoad(2, COPIES, mover, store)).state == "copied"
    assert len(rests) > len(COPIES)


def test_files_are_read_ahead_in_order_and_no_further_than_asked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(directory)[0]
    store.experts_ahead = 2
    heard: list[object] = []
    monkeypatch.setattr(store, "read_ahead", lambda *expert: heard.append(expert))
    mover = HeldMover()
    mover.heard = heard
    mover.steps.release(6)
    assert finish(ExpertLoad(4, COPIES, mover, store)).state == "copied"
    a, b, c = COPIES
    assert heard == [
        *("begin", a[:2], b[:2], (a, 0), (a, 1), c[:2], (b, 0), (b, 1), (c, 0), (c, 1), "end")
    ]


def test_a_truncated_file_fails_the_load_and_names_itself(tmp_path: Path) -> None:
    store, shape = make_store(write_checkpoint("shared1", tmp_path))
    os.truncate(tmp_path / "model.safetensors", 50_000)
    slots = slots_of(shape.slab(5))
    load = finish(ExpertLoad(1, COPIES, CpuMover(store, slots, Steps()), store))
    assert load.state == "failed" and load.failure is not None
    assert "model.safetensors has 50000 bytes; it had" in load.failure


# -- the thread's place --


def test_a_load_leaves_the_settings_of_other_threads_alone(
    directory: Path, store: ExpertStore
) -> None:
    before = (torch.get_num_threads(), os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0))
    mover = HeldMover()
    load = ExpertLoad(4, COPIES[:1], mover, store)
    mover.at_step.acquire()
    thread_id = load._thread.native_id
    assert thread_id is not None
    assert os.getpriority(os.PRIO_PROCESS, thread_id) == before[2]  # see stand_aside
    mover.steps.release(2)
    finish(load)
    after = (torch.get_num_threads(), os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0))
    assert after == before
