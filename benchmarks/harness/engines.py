"""Engines for benchmarks that run one themselves: vLLM's arguments, and pools put in slots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_serve.pools.pool import ExpertPool
from emo_serve.vllm_plugin import WORKER_EXTENSION_CLS, worker_cls_for
from emo_serve.vllm_plugin.contract import LOAD_FORMAT, PluginSettings

__all__ = ["engine_arguments", "load_pools"]


def engine_arguments(
    model: Path,
    num_slots: int,
    num_pools: int,
    *,
    host_expert_bytes: int = 0,
    device: str = "cpu",
    **more: Any,
) -> dict[str, Any]:
    """Return vLLM's engine arguments for serving pools, as the front end sets them, and `more`."""
    ours = PluginSettings(num_slots, num_pools, host_expert_bytes=host_expert_bytes)
    return {
        "model": str(model),
        "load_format": LOAD_FORMAT,
        "worker_cls": worker_cls_for(device),
        "worker_extension_cls": WORKER_EXTENSION_CLS,
        "additional_config": ours.to_config(),
        **more,
    }


def load_pools(llm: Any, copies: Sequence[Sequence[int]], pools: Sequence[ExpertPool]) -> None:
    """Make copies (layer, expert, slot) that hold these pools' experts; publish pools from row 0.

    `llm` is a vllm.LLM with one worker.
    """
    (answer,) = llm.collective_rpc("emo_start_load", args=(1, 1, copies))
    assert answer["ok"], answer
    ids = [[list(layer) for layer in pool.expert_ids] for pool in pools]
    while answer.get("state") != "published":
        (answer,) = llm.collective_rpc("emo_finish_load", args=(1, 1, 0, ids[0], 1.0))
        assert answer["ok"] and not answer["failure"], answer
        time.sleep(0.005)
    for row, pool in enumerate(pools):
        llm.collective_rpc("emo_publish_pool", args=(2, row, ids[row], pool.router_temperature))
