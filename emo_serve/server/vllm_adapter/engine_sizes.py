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
from vllm.distributed.utils import get_pp_indices
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
    ranks, stages = args.tensor_parallel_size, args.pipeline_parallel_size
    layers = resolved(lambda: _layers_per_stage(model.get_total_num_hidden_layers(), stages))
    cpu = _cpu_sizes(args, model, ranks, ranks * stages) if current_platform.is_cpu() else None
    return EngineSizes(int(model.dtype.itemsize), ranks, cpu, layers)


def _layers_per_stage(num_layers: int, num_stages: int) -> tuple[int, ...]:
    ends = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    found = tuple(end - first for first, end in ends)
    if not all(found):
        raise ConfigError(
            f"--pipeline-parallel-size is {num_stages}, and the model has {num_layers} layers; each"
            " stage needs one: lower it"
        )
    return found


def _cpu_sizes(args: argparse.Namespace, model: Any, ranks: int, workers: int) -> CpuSizes:
    block_tokens = args.block_size or _BLOCK_TOKENS
    page = FullAttentionSpec(
        block_size=block_tokens,
        num_kv_heads=max(1, model.get_total_num_kv_heads() // ranks),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(args.kv_cache_dtype, model),
        kv_quant_mode=get_kv_quant_mode(args.kv_cache_dtype),
    ).page_size_bytes
    block_bytes = page * model.get_total_num_hidden_layers()
    sequences = AsyncEngineArgs.get_batch_defaults(workers)[1][UsageContext.OPENAI_API_SERVER]
    kv_flag, kv_bytes = _given_cache(args)
    nodes = resolved(lambda: memory_nodes(workers))
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


def memory_nodes(num_workers: int) -> tuple[int, ...]:
    """Return the memory node that vLLM binds each worker to, as it finds it.

    That is the node of the worker's first CPU, or the first node allowed if that has no memory.
    """
    allowed, cpus = get_visible_memory_node(), get_allowed_cpu_list()
    binding = envs.VLLM_CPU_OMP_THREADS_BIND
    if not allowed or not cpus:
        return ()
    node_of = {cpu.id: cpu.numa_node for cpu in cpus}
    if binding == "auto":
        found = [allowed[n] if n < len(allowed) else allowed[0] for n in range(num_workers)]
    elif binding == "nobind":
        found = [cpus[0].numa_node] * num_workers
    else:
        lists = [set(parse_id_list(part)) & set(node_of) for part in binding.split("|")]
        found = [node_of[min(ids)] if ids else allowed[0] for ids in lists[:num_workers]]
    return tuple(node if node in allowed else allowed[0] for node in found)
