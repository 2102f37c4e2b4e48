"""The vocabulary's two tables as they are after vLLM has prepared a loaded model."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from emo_serve.vllm_plugin.vocabulary import hold_once

VOCABULARY, HIDDEN = 384, 64


@pytest.fixture
def rows(one_rank: None) -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))


def prepare(table: VocabParallelEmbedding, rows: torch.Tensor) -> None:
    """Load the rows, and do what vLLM does after it."""
    table.weight.data.copy_(rows)
    table.quant_method.process_weights_after_loading(table)


def held_once() -> tuple[VocabParallelEmbedding, ParallelLMHead]:
    """Return a model's two tables, of which vLLM would hold each twice."""
    table, head = VocabParallelEmbedding(VOCABULARY, HIDDEN), ParallelLMHead(VOCABULARY, HIDDEN)
    hold_once(torch.nn.ModuleList([table, head]))
    return table, head


def test_embeddings_are_never_packed(rows: torch.Tensor) -> None:
    table, _ = held_once()
    prepare(table, rows)
    assert not hasattr(table, "cpu_linear")
    assert torch.equal(table(torch.tensor([3, 383])), rows[[3, 383]])


def test_the_head_keeps_no_rows_beside_what_is_packed(rows: torch.Tensor) -> None:
    _, head = held_once()
    prepare(head, rows)
    assert head.weight.numel() == 0
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    got = head.quant_method.apply(head, x)
    assert torch.allclose(got, x @ rows.t(), atol=1e-4)


def test_one_table_for_both_stays_as_it_is(rows: torch.Tensor) -> None:
    table, head = VocabParallelEmbedding(VOCABULARY, HIDDEN), ParallelLMHead(VOCABULARY, HIDDEN)
    head.weight = table.weight
    hold_once(torch.nn.ModuleList([table, head]))
    prepare(head, rows)
    assert torch.equal(table.weight, rows)


def test_vllm_itself_holds_both_twice(rows: torch.Tensor) -> None:
    """If this fails, vLLM has mended it, and `vocabulary` can go."""
    for table in (VocabParallelEmbedding(VOCABULARY, HIDDEN), ParallelLMHead(VOCABULARY, HIDDEN)):
        prepare(table, rows)
        assert hasattr(table, "cpu_linear")
        assert table.weight.numel() == VOCABULARY * HIDDEN
