"""What --json prints about pool files: the values of the tables, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from emo_serve.cli.rendering.comparison import slab_bytes
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.comparison import PoolComparison
from emo_serve.pools.pool import ExpertPool

__all__ = ["comparison_record", "pool_list", "pool_record"]


def pool_list(catalog: PoolCatalog, expert_bytes: int | None) -> dict[str, Any]:
    """Return all pools without their expert ids, and the files that were refused."""
    records = [pool_record(pool, expert_bytes) for pool in catalog.pools.values()]
    for record in records:
        del record["experts"]
    return {"object": "list", "data": records, "refused": list(map(str, catalog.refused))}


def pool_record(pool: ExpertPool, expert_bytes: int | None) -> dict[str, Any]:
    """Return one pool; `experts` has its ids per layer, none for a dense layer."""
    ids = [list(layer) for layer in pool.expert_ids]
    return {
        "object": "pool",
        "name": pool.name,
        "description": pool.description,
        "experts_per_layer": list(map(len, ids)),
        "default_experts": pool.default_experts,
        "bytes": None if expert_bytes is None else sum(map(len, ids)) * expert_bytes,
        "has_scores": pool.has_scores,
        "router_temperature": pool.router_temperature,
        "model": None if pool.model is None else pool.model.name or pool.model.fingerprint,
        "calibration": None if pool.calibration is None else asdict(pool.calibration),
        "content_hash": pool.content_hash,
        "experts": ids,
    }


def comparison_record(
    comparison: PoolComparison,
    experts_per_layer: Sequence[int] | None,
    expert_bytes: int | None,
) -> dict[str, Any]:
    """Return what `pools compare` lays out; lists per layer are of MoE layers only, as `layers`."""

    def bytes_of(slots: int) -> int | None:
        if experts_per_layer is None or expert_bytes is None:
            return None
        return slab_bytes(slots, experts_per_layer, expert_bytes)

    return {
        "object": "comparison",
        "pools": list(comparison.names),
        "layers": list(comparison.layers),
        "similarity": [list(row) for row in comparison.similarity],
        "in_any_pool": list(comparison.unions),
        "in_every_pool": list(comparison.in_every_pool),
        "slots": [
            {
                "pools": need.count,
                "any": need.most,
                "any_bytes": bytes_of(need.most),
                "best": need.fewest,
                "best_bytes": bytes_of(need.fewest),
                "best_pools": list(need.names),
                "is_exact": need.is_exact,
            }
            for need in comparison.subset_needs()
        ],
    }
