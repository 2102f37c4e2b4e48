"""vLLM's CPU worker with pool rows on its V1 model runner."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from emo_serve.vllm_plugin.worker import PoolRowsWorker

__all__ = ["EmoCpuWorker"]


class EmoCpuWorker(PoolRowsWorker, CPUWorker):
    """Serve pools on a CPU."""
