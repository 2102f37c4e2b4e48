"""vLLM's GPU worker with pool rows on its V1 model runner, in case that is chosen over V2."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from emo_serve.vllm_plugin.worker import PoolRowsWorker

__all__ = ["EmoGpuWorker"]


class EmoGpuWorker(PoolRowsWorker, Worker):
    """Serve pools on a GPU."""
