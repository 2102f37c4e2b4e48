"""Which layers of the model this rank computes: all of them, or under pipeline parallelism some."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices

__all__ = ["Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline, by its number from 0, and its layers."""

    number: int
    layers: range

    @classmethod
    def of_this_rank(cls, num_layers: int) -> Stage:
        """Return the stage to which vLLM has assigned this rank."""
        group = get_pp_group()
        first, end = get_pp_indices(num_layers, group.rank_in_group, group.world_size)
        return cls(group.rank_in_group, range(first, end))
