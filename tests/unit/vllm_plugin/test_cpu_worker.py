"""A CPU worker: its KV cache, planned or vLLM's own choice; a later stage's buffers."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker import cpu_worker as upstream
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from emo_serve.vllm_plugin import cpu_worker
from emo_serve.vllm_plugin.contract import PluginSettings
from emo_serve.vllm_plugin.cpu_worker import EmoCpuWorker


@pytest.mark.parametrize(
    ("planned", "has_front_end", "expected"),
    [(7, True, 7), (None, True, -1), (7, False, -1)],
)
def test_a_planned_cache_is_not_compared_with_the_nodes_file(
    monkeypatch: pytest.MonkeyPatch, planned: int | None, has_front_end: bool, expected: int
) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("the node's file was read")

    monkeypatch.setattr(upstream, "get_memory_node_info", never)
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda self: -1)
    warm_ups: list[int] = []
    worker: Any = object.__new__(EmoCpuWorker)
    additional = PluginSettings(4, 8).to_config() if has_front_end else None
    worker.vllm_config = SimpleNamespace(additional_config=additional)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=planned)
    worker._should_warm_up_model = lambda: True
    worker.model_runner = SimpleNamespace(warming_up_model=lambda: warm_ups.append(1))
    assert worker.determine_available_memory() == expected
    assert bool(warm_ups) == (expected == 7)


@pytest.mark.parametrize(
    ("is_first", "is_v2", "is_prepared"),
    [(True, False, False), (False, False, True), (False, True, False)],
)
def test_a_later_stage_can_take_a_step_that_no_warm_up_came_before(
    monkeypatch: pytest.MonkeyPatch, is_first: bool, is_v2: bool, is_prepared: bool
) -> None:
    """Upstream's V1 runner asserts that the buffers are there, and makes them in a warm-up only."""
    text = inspect.getsource(GPUModelRunner.sync_and_gather_intermediate_tensors)
    assert "assert self.intermediate_tensors is not None" in text
    monkeypatch.setattr(cpu_worker, "get_pp_group", lambda: SimpleNamespace(is_first_rank=is_first))
    monkeypatch.setattr(CPUWorker, "load_model", lambda self: None)
    made = {"hidden_states": object()}
    model = SimpleNamespace(make_empty_intermediate_tensors=lambda **sizes: (made, sizes))
    worker: Any = object.__new__(EmoCpuWorker)
    worker.use_v2_model_runner = is_v2
    worker.model_runner = SimpleNamespace(
        intermediate_tensors=None,
        get_model=lambda: model,
        max_num_tokens=8,
        model_config=SimpleNamespace(dtype="bfloat16"),
        device="cpu",
    )
    worker.load_model()
    sizes = {"batch_size": 8, "dtype": "bfloat16", "device": "cpu"}
    assert worker.model_runner.intermediate_tensors == ((made, sizes) if is_prepared else None)
