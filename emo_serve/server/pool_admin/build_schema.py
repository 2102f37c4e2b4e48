"""The JSON that answers a request to build a pool: its card, and how it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from emo_serve.server.pool_admin.schema import PoolCard, card_of

if TYPE_CHECKING:  # it imports torch
    from emo_serve.server.pool_admin.builder import PoolBuild

__all__ = ["BuildCalibration", "BuiltPool", "built_of"]


class BuildCalibration(BaseModel):
    """How the pool was found, and how much of the examples' routing it covers."""

    model_config = ConfigDict(frozen=True)

    method: str
    documents: int
    tokens: int = Field(description="tokens of all documents, without those cut off")
    documents_cut: int = Field(description="documents longer than the context, which were cut")
    tokens_cut: int = Field(description="tokens cut off from them")
    experts: int = Field(description="experts kept per layer")
    seconds: float = Field(description="how long the build took")
    coverage: float | None = Field(
        description="share of the full router's mass inside the pool, mean over tokens and MoE"
        " layers; null if all experts are shared"
    )
    coverage_per_layer: list[float | None] = Field(
        description="coverage per layer, null for a dense layer"
    )


class BuiltPool(PoolCard):
    """A pool built on this server: its card, how it was found, and notes on its quality."""

    calibration: BuildCalibration
    notes: list[str] = Field(description="one sentence each, e.g. too little text, mixed domains")


def built_of(build: PoolBuild) -> BuiltPool:
    """Make the answer about a pool that was built."""
    found, documents = build.found, build.documents
    layers = [None if layer is None else layer.coverage for layer in found.layers]
    calibration = BuildCalibration(
        method=found.method,
        documents=found.documents,
        tokens=found.tokens,
        documents_cut=documents.num_cut,
        tokens_cut=documents.tokens_cut,
        experts=found.k,
        seconds=build.seconds,
        coverage=found.coverage,
        coverage_per_layer=layers,
    )
    card = card_of(build.status).model_dump(exclude_unset=True)
    return BuiltPool(**card, calibration=calibration, notes=list(build.notes))
