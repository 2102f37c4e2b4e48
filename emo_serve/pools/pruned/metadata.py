"""Pools from pruned checkpoints, and back: the `pruning_metadata.json` published beside one.

The released pruning scripts (github.com/allenai/EMO, src/hf_training/*prune*.py) write which
experts of the original model each layer kept. That list is a pool; the rest of the file, which
differs from script to script, is read for provenance only. Files we write (`pruned.checkpoint`)
have three more keys, so that reading them gives back the same pool: `router_temperature` where it
is not 1, `description` and `original_fingerprint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from emo_serve.errors import PoolFileError
from emo_serve.facts import MoeLayer
from emo_serve.names import check_pool_name
from emo_serve.pools.limits import MOST_COUNT, MOST_LAYERS, check_temperature, storable
from emo_serve.pools.pool import (
    ExpertPool,
    LayerExperts,
    PoolCalibration,
    PoolModel,
    check_layer,
    check_texts,
)
from emo_serve.pools.strict_json import missing_text, read_json, refusal

__all__ = ["METADATA_FILE", "pruning_metadata", "read_pruning_metadata"]

METADATA_FILE = "pruning_metadata.json"

_KEPT = "experts_kept_per_layer"
# The one published method that writes null for a MoE layer: it kept all of that layer's experts.
_NULL_KEEPS_ALL = "greedy_layerwise_variable"


def read_pruning_metadata(
    path: Path, name: str, moe_layers: Sequence[MoeLayer | None] | None
) -> ExpertPool:
    """Build the pool of the experts that a pruned checkpoint kept, with the original model's ids.

    With the original model's `moe_layers`, the pool is checked against them. Raises PoolFileError
    naming file, layer, value and what was expected.
    """
    source = str(path)
    check_pool_name(source, name)
    metadata = read_json(path)
    if not isinstance(metadata, dict):
        raise refusal(source, "the file", metadata, "an object")
    if _KEPT not in metadata:
        raise PoolFileError(missing_text(source, _KEPT, "the file"))
    kept = metadata[_KEPT]
    if not isinstance(kept, list) or not kept:
        raise refusal(source, _KEPT, kept, "a list with one entry per layer, null for a dense one")
    keeps_all = metadata.get("pruning_method") == _NULL_KEEPS_ALL
    layers: list[LayerExperts | None] = []
    for index, experts in enumerate(kept):
        model_layer = moe_layers[index] if moe_layers and index < len(moe_layers) else None
        if experts is None and keeps_all and model_layer is not None:
            experts = list(range(model_layer.num_experts))
        if experts is None:
            layers.append(None)
            continue
        if not isinstance(experts, list):
            raise refusal(source, _KEPT, experts, "a list of ids, or null if dense", index)
        check_layer(source, index, experts, None)
        layers.append(LayerExperts(tuple(experts)))
    if len(layers) > MOST_LAYERS:
        raise refusal(source, f"the length of {_KEPT}", len(layers), f"at most {MOST_LAYERS}")
    texts = _description(metadata), _model(metadata), _calibration(metadata)
    check_texts(source, *texts)
    pool = ExpertPool(
        name=name,
        layers=tuple(layers),
        router_temperature=check_temperature(source, metadata.get("router_temperature", 1.0)),
        description=texts[0],
        model=texts[1],
        calibration=texts[2],
    )
    if moe_layers is not None:
        pool.check_fits(moe_layers, None, source)
    return pool


def pruning_metadata(
    pool: ExpertPool,
    moe_layers: Sequence[MoeLayer | None],
    model_name: str,
    fingerprint: str,
) -> dict[str, object]:
    """Return the file's content for a pool that was completed for the model."""
    made_for = pool.model.name if pool.model else None
    metadata: dict[str, object] = {
        "original_model": made_for or storable(model_name),
        "original_fingerprint": fingerprint,
        "num_shared_experts": max((moe.num_shared_experts for moe in moe_layers if moe), default=0),
    }
    sizes = {len(ids) for ids in pool.expert_ids if ids}
    if len(sizes) == 1:
        metadata["prune_keep_k"] = sizes.pop()
    if pool.description:
        metadata["description"] = pool.description
    if pool.calibration is not None:
        metadata["pruning_method"] = pool.calibration.method
        metadata["num_calibration"] = pool.calibration.documents
    if pool.router_temperature != 1.0:
        metadata["router_temperature"] = pool.router_temperature
    metadata[_KEPT] = [None if layer is None else list(layer.experts) for layer in pool.layers]
    return metadata


def _description(metadata: Mapping[str, object]) -> str:
    description, task = metadata.get("description"), metadata.get("task")
    if isinstance(description, str):
        return description
    return f"kept for the task {task}" if isinstance(task, str) else ""


def _model(metadata: Mapping[str, object]) -> PoolModel | None:
    original, fingerprint = metadata.get("original_model"), metadata.get("original_fingerprint")
    if not isinstance(original, str):
        return None
    return PoolModel(original, fingerprint if isinstance(fingerprint, str) else None)


def _calibration(metadata: Mapping[str, object]) -> PoolCalibration | None:
    method, documents = metadata.get("pruning_method"), metadata.get("num_calibration")
    if not isinstance(method, str):
        return None
    if (
        not isinstance(documents, int)
        or isinstance(documents, bool)
        or not (0 <= documents <= MOST_COUNT)
    ):
        documents = None
    return PoolCalibration(method, documents)
