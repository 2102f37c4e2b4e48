"""Write a pool as its own checkpoint, in the layout of the released pruned ones.

Experts outside the pool are left out: gate rows and experts are sliced to the pool's, ascending, so
that shared experts stay last, and the trunk is copied. Any EMO implementation that reads the
released layout then computes what the pool computes, because slicing before the softmax equals
masking before it. Tensors are copied in pieces, never the whole model at once, into a temporary
directory that is renamed to the target when it is complete.

Three things need more than slicing:

- Temperature goes into the weights: a gate whose rows are divided by t gives logits / t. Where the
  checkpoint's dtype would round them, the gates are written in float32.
- `num_experts_per_tok` is one number. It becomes the number for the largest layer, min(k, |P|). In
  a layer with fewer experts a token takes all of them here; the released code cannot run such a
  layer, and the export says so. (The published scripts write the smallest layer's number, which
  changes what every other layer computes.)
- Always-active ids are renumbered, so one list for all layers may become one list per layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from emo_serve.checkpoints.shards import NewTensor, write_shards
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.pruning import kept_tensors, scaled_gate_dtype
from emo_serve.emo.tensor_names import expert_tensor_name, gate_name
from emo_serve.errors import ConfigError, PoolStoreError
from emo_serve.facts import MoeLayer
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.pruned.metadata import METADATA_FILE, pruning_metadata
from emo_serve.pools.sizes import served_pool

__all__ = ["PrunedCheckpoint", "export_pool", "pruned_config"]

_INDEX = "model.safetensors.index.json"
_SPARE_BYTES = 2**20  # for config, index and file system overhead
# Not copied, besides weights in any format: files written anew, and the source model's card.
_NOT_COPIED = ("config.json", _INDEX, METADATA_FILE, "README.md")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OTHER_INDEXES = (".bin.index.json", ".h5.index.json")


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What was written; `notes` are for readers who load it elsewhere."""

    directory: Path
    weight_bytes: int
    weight_files: int
    notes: tuple[str, ...]


def export_pool(
    pool: ExpertPool,
    checkpoint: Checkpoint,
    out: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> PrunedCheckpoint:
    """Write the checkpoint that computes what `pool` computes in the model, as directory `out`.

    A pool with a default size is written at that size, as it is served. `tell` is called with the
    bytes of weights written so far, and with those of all. `out` must be absent or empty;
    afterwards it is complete, or as before. Raises PoolFileError for a pool of another model,
    ConfigError for an unusable `out`, CheckpointError for a source that cannot be read and
    PoolStoreError for a disk that cannot be written.
    """
    moe_layers = checkpoint.facts.moe_layers
    fingerprint = checkpoint.fingerprint()
    pool.check_fits(moe_layers, fingerprint, f"pool {pool.name!r}")
    pool = served_pool(pool, moe_layers, f"pool {pool.name!r}")
    if not any(moe_layers):
        raise ConfigError(f"{checkpoint.directory} has no MoE layer; there is nothing to prune")
    tensors = kept_tensors(checkpoint, pool.expert_ids, pool.router_temperature)
    companions = _companions(checkpoint.directory)
    metadata = pruning_metadata(pool, moe_layers, checkpoint.directory.resolve().name, fingerprint)
    sources = _sources(pool, checkpoint)
    is_sharded = (checkpoint.directory / _INDEX).exists() or len(sources) > 1
    shard_bytes = max(file.path.stat().st_size for file in sources) if is_sharded else None
    with _directory_to_be(out, sum(tensor.num_bytes for tensor in tensors)) as partial_out:
        files = write_shards(partial_out, _telling(tensors, tell), shard_bytes)
        for file in companions:
            shutil.copyfile(file, partial_out / file.name)
        _write_json(partial_out / METADATA_FILE, metadata)
        fields = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
        config = pruned_config(fields, moe_layers, pool, checkpoint.config.num_experts_per_tok)
        _write_json(partial_out / "config.json", config)
        for source in sources:
            source.check()  # no file changed while it was read
        Checkpoint.open(partial_out)  # our own reader must accept it
        weight_bytes = sum(file.stat().st_size for file in files)
    notes = _notes(pool, checkpoint, config["num_experts_per_tok"])
    return PrunedCheckpoint(out, weight_bytes, len(files), notes)


# -- config --


def pruned_config(
    fields: Mapping[str, Any],
    moe_layers: Sequence[MoeLayer | None],
    pool: ExpertPool,
    num_experts_per_tok: int,
) -> dict[str, Any]:
    """Return the source's config.json with what the (completed) pool changes."""
    counts = [len(experts) for experts in pool.expert_ids]
    config = dict(fields)
    config["num_experts"] = max(counts)
    config["num_experts_per_tok"] = min(num_experts_per_tok, max(counts))
    if config.get("num_experts_per_layer") is not None or len(set(counts)) > 1:
        config["num_experts_per_layer"] = counts
    always = [
        [kept.index(expert) for expert in layer.always_active] if layer else []
        for kept, layer in zip(pool.expert_ids, moe_layers, strict=True)
    ]
    if not any(always):
        return config
    moe_always = [ids for ids, layer in zip(always, moe_layers, strict=True) if layer]
    is_one_list = config.get("always_active_experts_per_layer") is None
    if is_one_list and all(ids == moe_always[0] for ids in moe_always):
        config["always_active_experts"] = moe_always[0]
    else:
        config["always_active_experts"] = None
        config["always_active_experts_per_layer"] = always
    return config


def _notes(pool: ExpertPool, checkpoint: Checkpoint, top_k: int) -> tuple[str, ...]:
    notes = []
    few = [index for index, kept in enumerate(pool.expert_ids) if 0 < len(kept) < top_k]
    if few:
        notes.append(
            f"layer {few[0]} keeps {len(pool.expert_ids[few[0]])} experts, and a token takes"
            f" {top_k}: emo-serve gives it all of them, the released modelling code cannot run"
            " such a layer"
        )
    temperature = pool.router_temperature
    if temperature != 1.0:
        layer = next(index for index, kept in enumerate(pool.expert_ids) if kept)
        dtype = checkpoint.file_of(gate_name(layer)).dtype(gate_name(layer))
        is_wider = scaled_gate_dtype(dtype, temperature) != dtype
        notes.append(
            f"the gates are divided by the pool's router_temperature, {temperature:g}"
            + ("; they are float32, and a loader that rounds them adds its error" * is_wider)
        )
    return tuple(notes)


# -- files --


def _telling(tensors: Sequence[NewTensor], tell: Callable[[int, int], None]) -> list[NewTensor]:
    """Return the same tensors, which tell of each piece once it has been written."""
    total, done = sum(tensor.num_bytes for tensor in tensors), 0

    def told(pieces: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        nonlocal done
        for piece in pieces():
            yield piece
            done += piece.nbytes
            tell(done, total)

    return [replace(tensor, pieces=partial(told, tensor.pieces)) for tensor in tensors]


def _sources(pool: ExpertPool, checkpoint: Checkpoint) -> set[TensorFile]:
    """Return the open files that hold the tensors that the pool keeps."""
    names = list(checkpoint.trunk_names())
    for layer, kept in enumerate(pool.expert_ids):
        names += [
            expert_tensor_name(layer, expert, matrix)
            for expert in kept
            for matrix in ("gate", "up", "down")
        ]
    return {checkpoint.file_of(name) for name in names}


def _companions(source: Path) -> list[Path]:
    """Return the files beside the weights that a loader may need: tokenizer, generation, code."""
    return sorted(
        file
        for file in source.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in _NOT_COPIED
        and not file.name.endswith((*_WEIGHTS, *_OTHER_INDEXES))
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _directory_to_be(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a directory that becomes `out` if the block succeeds, and is removed otherwise."""
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--out {out} is a file; give a directory that is absent or empty")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"--out {out} is not empty; give a directory that is absent or empty")
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes + _SPARE_BYTES:
            raise ConfigError(
                f"--out {out}: the checkpoint takes {num_bytes / 2**30:.3g} GiB and its disk has"
                f" {free / 2**30:.3g} GiB free"
            )
        partial.mkdir()
        try:
            yield partial
            partial.rename(target)  # replaces an empty directory, but no other
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise PoolStoreError(f"--out {out} cannot be written: {reason}") from error
