"""vLLM's CPU worker with pool rows on its V1 model runner, and the KV cache that was planned."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from emo_serve.vllm_plugin.settings import has_front_end
from emo_serve.vllm_plugin.worker import PoolRowsWorker

__all__ = ["EmoCpuWorker"]

logger = init_logger(f"vllm.{__name__}")  # only vLLM's loggers print in its processes


class EmoCpuWorker(PoolRowsWorker, CPUWorker):
    """Serve pools on a CPU."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the trunk as upstream does; what it was read through goes back to the kernel."""
        super().load_model(*args, **kwargs)
        _return_freed_memory()
        if not get_pp_group().is_first_rank and not self.use_v2_model_runner:
            self._prepare_stage()

    def _prepare_stage(self) -> None:
        """Make the buffers for what the stage before sends.

        Upstream makes them while it warms up, which may be left out: vllm 0.32.0,
        v1/worker/gpu_model_runner.py (_dummy_run).
        """
        runner = self.model_runner
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )

    def determine_available_memory(self) -> int:
        """Return the KV cache that the front end planned, after warming up as upstream does.

        Upstream refuses one that is larger than what it sees as free: it counts a container's page
        cache as used, and of a node's memory knows only what the node's file says.
        """
        planned: int | None = self.cache_config.kv_cache_memory_bytes
        if planned is None or not has_front_end(self.vllm_config):
            return super().determine_available_memory()  # type: ignore[no-any-return]
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
            _return_freed_memory()
        logger.info("Planned (%.2f) GiB for KV cache.", planned / 2**30)
        return planned


def _return_freed_memory() -> None:
    """Have glibc's allocator give the kernel back what is free in its heap."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
