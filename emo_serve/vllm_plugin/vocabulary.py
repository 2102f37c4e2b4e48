"""The two tables of the vocabulary, each held once: vLLM on a CPU holds each twice.

vLLM packs both for products on a CPU and keeps the rows beside them. But embeddings are only looked
up, so they are never packed; and of the head only products are asked for, so its rows are dropped.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

__all__ = ["hold_once"]


def hold_once(model: nn.Module) -> None:
    """Have a model hold each table once, unless one serves as both; before weights are loaded."""
    tables = [each for each in model.modules() if isinstance(each, VocabParallelEmbedding)]
    if len({id(table.weight) for table in tables}) < len(tables):
        return
    for table in tables:
        table.quant_method = _Products() if isinstance(table, ParallelLMHead) else _Rows()


class _Rows(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


class _Products(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
