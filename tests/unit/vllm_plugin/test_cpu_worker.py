"""The KV cache of a CPU worker: the front end's plan, or vLLM's own choice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker import cpu_worker as upstream
from vllm.v1.worker.cpu_worker import CPUWorker

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
