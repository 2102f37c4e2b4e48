"""Ask vLLM what its flags mean in bytes: dtype, KV cache, and on a CPU the memory bound to.

The formulas and the choice of memory nodes are vLLM's own (0.32.0: `FullAttentionSpec`,
`CPUWorker.__init__`, `OMPProcessManager`); only what they do inside a worker is repeated here.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.cpu_resource_utils import (
    get_allowed_cpu_list,
    get_memory_node_info,
    get_visible_memory_node,
    parse_id_list,
)
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

from emo_serve.config import GIB
from emo_serve.errors import ConfigError
from emo_serve.server.vllm_adapter.flags import engine_args, resolved
from emo_serve.server.vllm_adapter.sizes import CpuSizes, EngineSizes, MemoryShare

__all__ = ["engine_sizes", "memory_nodes"]

_BLOCK_TOKENS = 128  # CpuPlatform.check_and_update_config, without --block-size
_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB; vLLM lets it win over the flag


def engine_sizes(args: argparse.Namespace) -> EngineSizes:
    """Return the sizes that these flags lead to; raises ConfigError for what vLLM refuses."""
    model = resolved(lambda: engine_args(args).create_model_config())
    ranks = args.tensor_parallel_size
    cpu = _cpu_sizes(args, model, ranks) if current_platform.is_cpu() else None
    return EngineSizes(int(model.dtype.itemsize), ranks, cpu)


def _cpu_sizes(args: argparse.Namespace, model: Any, ranks: int) -> CpuSizes:
    block_tokens = args.block_size or _BLOCK_TOKENS
    page = FullAttentionSpec(
        block_size=block_tokens,
        num_kv_heads=max(1, model.get_total_num_kv_heads() // ranks),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(args.kv_cache_dtype, model),
        kv_quant_mode=get_kv_quant_mode(args.kv_cache_dtype),
    ).page_size_bytes
    block_bytes = page * model.get_total_num_hidden_layers()
    sequences = AsyncEngineArgs.get_batch_defaults(ranks)[1][UsageContext.OPENAI_API_SERVER]
    kv_flag, kv_bytes = _given_cache(args)
    nodes = resolved(lambda: memory_nodes(ranks))
    return CpuSizes(
        block_tokens,
        block_bytes,
        model.max_model_len,
        args.max_num_seqs or sequences,
        kv_flag,
        kv_bytes,
        _given_share(args, nodes) if kv_bytes is None else None,
        nodes,
    )


def _given_cache(args: argparse.Namespace) -> tuple[str | None, int | None]:
    """Return the KV cache of one worker that the user asks for, and with which flag."""
    if text := os.environ.get(_KV_VARIABLE):
        try:
            return _KV_VARIABLE, int(text) * GIB
        except ValueError as error:
            raise ConfigError(f"{_KV_VARIABLE} is {text!r}; give whole GiB, e.g. 4") from error
    if args.kv_cache_memory_bytes is not None:
        return "--kv-cache-memory-bytes", args.kv_cache_memory_bytes
    return None, None


def _given_share(args: argparse.Namespace, nodes: tuple[int, ...]) -> MemoryShare | None:
    if not args.is_memory_share_given or not nodes:
        return None
    share, memory = args.gpu_memory_utilization, get_memory_node_info(nodes[0])
    flag = f"--gpu-memory-utilization {share:g}"
    return MemoryShare(flag, math.ceil(memory.total_memory * share), memory.available_memory)


def memory_nodes(num_ranks: int) -> tuple[int, ...]:
    """Return the memory node that vLLM binds each worker to, as it finds it.

    That is the node of the worker's first CPU, or the first node allowed if that has no memory.
    """
    allowed, cpus = get_visible_memory_node(), get_allowed_cpu_list()
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if not allowed or not cpus:
        return ()
    node_of = {cpu.id: cpu.numa_node for cpu in cpus}
    if binding == "auto":
        found = [allowed[rank] if rank < len(allowed) else allowed[0] for rank in range(num_ranks)]
    elif binding == "nobind":
        found = [cpus[0].numa_node] * num_ranks
    else:
        lists = [set(parse_id_list(part)) & set(node_of) for part in binding.split("|")]
        found = [node_of[min(ids)] if ids else allowed[0] for ids in lists[:num_ranks]]
    return tuple(node if node in allowed else allowed[0] for node in found)
