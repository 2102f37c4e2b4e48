"""Other sizes of a pool that has scores: what each would keep and take, and how one is defined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from emo_serve.errors import ConfigError, PoolFileError, RequestError
from emo_serve.facts import MoeLayer
from emo_serve.names import FILE_NAME_RULE, NAME_PATTERN
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.sizes import sizes_of
from emo_serve.pools.strict_model import Expected, StrictModel

__all__ = ["Cut", "CutList", "CutRequest", "cut_pool", "cuts_of"]


class CutRequest(StrictModel):
    """Body of POST /v1/pools/{name}/cut."""

    name: Annotated[str, Field(pattern=NAME_PATTERN), Expected(FILE_NAME_RULE)] = Field(
        description="of the pool to define"
    )
    experts: Annotated[int, Expected("how many experts per layer to keep")] = Field(
        description="experts per layer to keep, shared ones included",
        json_schema_extra={"minimum": 1},
    )


class Cut(BaseModel):
    """One size of a pool; `bytes` are those of its experts on all devices together."""

    model_config = ConfigDict(frozen=True)

    experts: int = Field(description="experts per layer, shared ones included")
    share: float = Field(
        description="share of the scores that is kept, shared experts apart, mean over MoE layers;"
        " for a pool found by the router that is its coverage of the examples"
    )
    bytes: int


class CutList(BaseModel):
    """The sizes that a pool can be cut to, the smallest first."""

    model_config = ConfigDict(frozen=True)

    object: Literal["pool.cuts"] = "pool.cuts"
    name: str
    data: list[Cut]


def cuts_of(pool: ExpertPool, moe_layers: Sequence[MoeLayer | None], slot_bytes: int) -> list[Cut]:
    """Return every size of the pool; raises RequestError if its file has no scores."""
    _check_scores(pool)
    layers = zip(pool.layers, moe_layers, strict=True)
    kept = [_kept(layer.scores or (), moe) for layer, moe in layers if layer and moe]
    return [
        Cut(
            experts=k,
            share=sum(each[min(k, len(each) - 1)] for each in kept) / len(kept),
            bytes=sum(min(k, len(each) - 1) for each in kept) * slot_bytes,
        )
        for k in sizes_of(pool, moe_layers) or ()
    ]


def cut_pool(
    pool: ExpertPool, request: CutRequest, moe_layers: Sequence[MoeLayer | None]
) -> ExpertPool:
    """Return the pool of the size and name that are asked for.

    Raises RequestError if it has no scores, or cannot be so small.
    """
    _check_scores(pool)
    try:
        return replace(pool.cut(request.experts, moe_layers), name=request.name)
    except (ConfigError, PoolFileError) as error:
        raise RequestError(str(error)) from error


def _check_scores(pool: ExpertPool) -> None:
    if not pool.has_scores:
        raise RequestError(
            f"pool {pool.name!r} has no scores, by which it could be cut; build it anew, or define"
            " it from a file that has them"
        )


def _kept(scores: Sequence[float], moe: MoeLayer) -> tuple[float, ...]:
    """Return, for each number of experts from none on, the share of one layer's scores kept."""
    others = sorted(
        (max(0.0, score) for id, score in enumerate(scores) if id not in moe.implied),
        reverse=True,
    )
    total = sum(others) or 1.0
    return (*(0.0 for _ in moe.implied), *(part / total for part in _sums(others)))


def _sums(values: Sequence[float]) -> Iterator[float]:
    """Yield the sums of the first values: of none, of one, ..., of all."""
    total = 0.0
    yield total
    for value in values:
        total += value
        yield total
