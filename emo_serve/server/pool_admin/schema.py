"""The JSON of /v1/pools: options and answers, as /openapi.json documents them.

The JSON that defines a pool, or asks for one to be built, is in `pools.document`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from emo_serve.pools.limits import MOST_EXPERTS
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.strict_model import StrictModel
from emo_serve.server.pool_admin.status import Overview, PoolStatus
from emo_serve.vllm_plugin.contract import PoolUsage

__all__ = [
    "DeletedPool",
    "EvictOptions",
    "LayerUsage",
    "ListOptions",
    "LoadOptions",
    "NoOptions",
    "PoolCard",
    "PoolDetails",
    "PoolInBuilding",
    "PoolList",
    "PoolSizes",
    "ReplaceOptions",
    "ShowOptions",
    "SlotAccount",
    "UsageAnswer",
    "body_schema",
    "card_of",
    "details_of",
    "list_of",
    "usage_answer",
]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


# -- in --


class LoadOptions(StrictModel):
    """Body of POST /v1/pools/{name}/load."""

    pin: bool = Field(False, description="keep the pool resident until it is unpinned")


class EvictOptions(StrictModel):
    """Body of POST /v1/pools/{name}/evict and of POST /v1/pools/evict-all."""

    drain: bool = Field(
        False,
        description="if a pool has running requests, admit no new ones and evict it when they"
        " have ended; without this, the answer is 409",
    )


class NoOptions(StrictModel):
    """Body of POST /v1/pools/{name}/pin and /unpin: empty, or {}."""


class ListOptions(BaseModel):
    """Query of GET /v1/pools."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: bool = Field(
        False, description="add each pool's expert ids, and `holders` of each expert of the model"
    )


class ShowOptions(BaseModel):
    """Query of GET /v1/pools/{name}."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: int | None = Field(
        None,
        ge=1,
        le=MOST_EXPERTS,
        description="experts per layer: show the pool as it would be at that size, as NAME@K",
    )


class ReplaceOptions(BaseModel):
    """Query of POST /v1/pools."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replace: bool = Field(
        False, description="redefine an existing pool; without this, the answer is 409"
    )


def body_schema(*models: type[BaseModel], required: bool = False) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a body that the route reads itself.

    The body may be an object of any of the models.
    """
    schemas = []
    for model in models:
        schema = model.model_json_schema()
        definitions = schema.pop("$defs", {})
        schemas.append(_inlined(schema, definitions))
    content = {"application/json": {"schema": {"anyOf": schemas} if schemas[1:] else schemas[0]}}
    return {"requestBody": {"required": required, "content": content}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Replace references by definitions: in OpenAPI, `$ref` is relative to the whole document."""
    if isinstance(node, dict):
        if "$ref" in node:
            return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in node.items()}
    if isinstance(node, list):
        return [_inlined(value, definitions) for value in node]
    return node


# -- out --


class PoolSizes(_Answer):
    """The numbers of experts per layer at which a pool can be asked for, both included."""

    least: int
    most: int


class PoolCard(_Answer):
    """One pool; `bytes` are those of its experts on all devices together."""

    object: Literal["pool"] = "pool"
    name: str
    kind: Literal["base", "pool", "size", "union"] = Field(
        description="base: all experts of the model; size: the best experts of a pool, named a@8;"
        " union: several pools, named a+b"
    )
    description: str
    default: bool = Field(description="serves requests that name no pool")
    version: int | None = Field(
        description="how often this pool was defined since the server started; null for a union"
    )
    persisted: bool = Field(description="this definition survives a restart")
    state: Literal["absent", "waiting", "loading", "resident", "streamed", "closing"] = Field(
        description="streamed: too large for the slots, and served at once all the same, slowly,"
        " its experts passing through --stream-slots; closing: admits no new requests and will be"
        " evicted"
    )
    resident: bool = Field(description="all its experts are in slots, whichever pool loaded them")
    pinned: bool
    row: int | None = Field(description="its row in the engine's pool table; null if it has none")
    running_requests: int
    waiting_requests: int
    experts_per_layer: list[int] = Field(description="0 for a dense layer")
    sizes: PoolSizes | None = Field(
        description="the sizes at which it can be asked for, by the name NAME@K; null for the base"
        " pool, a pool without scores, a size and a union"
    )
    experts_alone: int = Field(description="experts held by no other resident pool")
    experts_shared: int = Field(description="experts also held by other resident pools")
    experts_missing: int = Field(description="experts that a load must copy")
    bytes: int
    router_temperature: float
    content_hash: str = Field(
        description="hash of experts and temperature, which determine the answers"
    )
    hits: int = Field(description="requests of clients that found it resident")
    misses: int = Field(description="requests of clients that did not")
    coverage: float | None = Field(
        description="mean coverage of its requests that have ended; null if none has"
    )
    last_used: int | None = Field(
        description="Unix time of the last client's request; null before the first"
    )
    experts: list[list[int]] | None = Field(
        None, description="expert ids per layer; only if requested"
    )


class PoolDetails(PoolCard):
    """One pool with its expert ids, an empty list for a dense layer."""

    experts: list[list[int]]
    holders: list[list[int]] = Field(
        description="for each layer and each expert of the model, how many resident pools hold it"
    )


class SlotAccount(_Answer):
    """The slab's slots in all layers together; bytes are on all devices together."""

    total: int
    used: int
    free: int
    leased: int = Field(description="slots held by pools with running requests")
    bytes_per_slot: int
    used_bytes: int


class PoolInBuilding(_Answer):
    """A pool that is being built, one layer after the other, each by a pass over all examples."""

    name: str
    done: int = Field(description="passes of one example that have ended")
    total: int = Field(description="passes of one example in all; 0 until they are counted")


class PoolList(_Answer):
    """All pools: the base pool, defined pools, and sizes and unions while they are in use."""

    object: Literal["list"] = "list"
    data: list[PoolCard]
    refused: list[str] = Field(description="pool files that were left out, each with the reason")
    persists: bool = Field(description="pools added and removed here survive a restart")
    experts_per_layer: list[int] = Field(
        description="experts of the model per layer; 0 for a dense layer"
    )
    slots: SlotAccount
    running_requests: int
    waiting_requests: int
    building: PoolInBuilding | None = Field(
        description="the pool that is being built from examples; null if there is none"
    )
    holders: list[list[int]] | None = Field(
        None,
        description="for each layer and each expert of the model, how many resident pools hold it;"
        " only if requested",
    )


class LayerUsage(_Answer):
    """How often tokens chose the pool's experts in one MoE layer."""

    num_experts: int = Field(description="experts of the model in this layer")
    experts: list[int] = Field(description="the pool's expert ids, ascending")
    counts: list[int] = Field(
        description="for each of these experts, the number of routed tokens that chose it"
    )


class UsageAnswer(_Answer):
    """How often tokens chose a pool's experts since the engine started.

    Counts are per pool content: pools with equal experts and temperature share them, and a size or
    a union has its own. If more than 128 tokens of the pool were routed at once, a random sample of
    them was counted.
    """

    object: Literal["pool.usage"] = "pool.usage"
    name: str
    content_hash: str
    tokens: int = Field(
        description="exact number of tokens routed in the pool, without those from the prefix"
        " cache and those of the server's own requests"
    )
    layers: list[LayerUsage | None] = Field(
        description="one entry per layer, null for a dense layer"
    )


class DeletedPool(_Answer):
    """A pool that was removed."""

    object: Literal["pool"] = "pool"
    id: str
    name: str
    deleted: bool = True


def card_of(status: PoolStatus, *, experts: bool = False) -> PoolCard:
    """Build the answer about one pool."""
    return PoolCard.model_validate(_fields(status) | (_expert_ids(status) if experts else {}))


def details_of(overview: Overview, status: PoolStatus) -> PoolDetails:
    """Build the full answer about one pool."""
    holders = {"holders": _holders(overview)}
    return PoolDetails.model_validate(_fields(status) | _expert_ids(status) | holders)


def list_of(overview: Overview, *, experts: bool) -> PoolList:
    """Build the answer about all pools; without `experts`, it has no ids and no holders."""
    stats, building = overview.stats, overview.building
    maps = {"holders": _holders(overview)} if experts else {}
    return PoolList.model_validate(
        {
            "object": "list",
            "data": [card_of(status, experts=experts) for status in overview.pools],
            "refused": list(overview.refused),
            "persists": overview.persists,
            "experts_per_layer": _experts_per_layer(overview.pools[0]),
            "slots": SlotAccount(
                total=stats.total_slots,
                used=stats.used_slots,
                free=stats.free_slots,
                leased=stats.leased_slots,
                bytes_per_slot=stats.slot_bytes,
                used_bytes=stats.used_bytes,
            ),
            "running_requests": stats.running_requests,
            "waiting_requests": stats.waiting_requests,
            "building": building and vars(building),
            **maps,
        }
    )


def usage_answer(pool: ExpertPool, usage: PoolUsage) -> UsageAnswer:
    """Build the answer about how often a pool's experts were chosen."""
    layers = [
        LayerUsage(num_experts=len(counts), experts=list(ids), counts=[counts[e] for e in ids])
        if ids
        else None
        for ids, counts in zip(pool.expert_ids, usage.counts, strict=True)
    ]
    return UsageAnswer(
        name=pool.name, content_hash=pool.content_hash, tokens=usage.tokens, layers=layers
    )


def _fields(status: PoolStatus) -> dict[str, object]:
    pool, shares = status.pool, status.shares
    return {
        "object": "pool",
        "name": pool.name,
        "kind": status.kind,
        "description": pool.description,
        "default": status.is_default,
        "version": status.version,
        "persisted": status.is_stored,
        "state": status.state,
        "resident": status.is_resident,
        "pinned": status.is_pinned,
        "row": status.row,
        "running_requests": status.running_requests,
        "waiting_requests": status.waiting_requests,
        "experts_per_layer": _experts_per_layer(status),
        "sizes": status.sizes and PoolSizes(least=status.sizes[0], most=status.sizes[-1]),
        "experts_alone": shares.alone,
        "experts_shared": shares.shared,
        "experts_missing": shares.missing,
        "bytes": status.num_bytes,
        "router_temperature": pool.router_temperature,
        "content_hash": pool.content_hash,
        "hits": status.use.hits,
        "misses": status.use.misses,
        "coverage": status.use.coverage,
        "last_used": status.use.last_used,
    }


def _experts_per_layer(status: PoolStatus) -> list[int]:
    return [len(ids) for ids in status.pool.expert_ids]


def _expert_ids(status: PoolStatus) -> dict[str, object]:
    return {"experts": [list(ids) for ids in status.pool.expert_ids]}


def _holders(overview: Overview) -> list[list[int]]:
    base = overview.pools[0].pool  # all experts of the model
    count = overview.sharing.count
    return [[count(layer, expert) for expert in ids] for layer, ids in enumerate(base.expert_ids)]
