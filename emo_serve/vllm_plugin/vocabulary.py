"""The two tables of the vocabulary, each held once: vLLM on a CPU holds each twice.

vLLM packs both for products on a CPU and keeps the rows beside them. But the first is only looked
up, and of the last only products are asked for.
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

__all__ = ["LookedUp", "Multiplied", "hold_once"]


class LookedUp(VocabParallelEmbedding):
    """The embeddings: rows, never packed."""

    def __init__(self, vocabulary: int, hidden_size: int) -> None:
        super().__init__(vocabulary, hidden_size)
        self.quant_method = _Rows()


class Multiplied(ParallelLMHead):
    """The head: on a CPU packed, and the rows dropped."""

    def __init__(self, vocabulary: int, hidden_size: int, *, prefix: str) -> None:
        super().__init__(vocabulary, hidden_size, prefix=prefix)
        self.quant_method = _Products()


def hold_once(model: nn.Module) -> None:
    """Have a model of vLLM's hold its tables once, too, unless one table serves as both."""
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
