"""What a calibration finds: scores, the experts to keep, and how much routing they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration, PoolModel

__all__ = ["Calibration", "LayerFindings"]


@dataclass(frozen=True)
class LayerFindings:
    """What was found about one MoE layer: a score for each expert, and the ids kept.

    `coverage` is the share of the full router's mass inside `experts`, mean over tokens.
    `own_coverage` is what one pool of the same size per passage would cover (`advice`). Shared
    experts count in neither. None without documents, or where all experts are shared.
    """

    scores: tuple[float, ...]
    experts: tuple[int, ...]
    coverage: float | None
    own_coverage: float | None


@dataclass(frozen=True)
class Calibration:
    """The outcome of one run; None in `layers` stands for a dense layer.

    `experts_read` counts the experts read from the checkpoint, per layer; a build on a server reads
    none itself.
    """

    method: str
    seed: int
    k: int
    documents: int
    tokens: int
    layers: tuple[LayerFindings | None, ...]
    experts_read: tuple[int, ...]
    bytes_read: int

    @property
    def coverage(self) -> float | None:
        """Return the share of the full router's mass in the pool, mean over tokens and layers."""
        return _mean([layer.coverage for layer in self.layers if layer is not None])

    @property
    def own_coverage(self) -> float | None:
        """Return the coverage if each passage had its own pool."""
        return _mean([layer.own_coverage for layer in self.layers if layer is not None])

    def pool(
        self, name: str, made_for: PoolModel | None = None, description: str = ""
    ) -> ExpertPool:
        """Return the pool of the experts kept, with all scores and a record of how it was found."""
        layers = (
            None if found is None else LayerExperts(found.experts, found.scores)
            for found in self.layers
        )
        record = PoolCalibration(self.method, self.documents, self.tokens, self.seed, self.k)
        return ExpertPool(
            name, tuple(layers), description=description, model=made_for, calibration=record
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
