"""What a pool is: per MoE layer a set of experts, the temperature they are routed at, and a name.

A pool is a value: frozen, compared by content, and every operation returns a new one. Whatever is
built, from a file or in memory, has been checked against itself; whether it fits a model is asked
separately (`check_fits`), since a pool file can be read where the model is not.

The file, "emo-pool/1", is one JSON object:

    {"format": "emo-pool/1", "name": "math",
     "layers": [null, {"experts": [3, 17], "scores": [0.01, ...]}, ...],
     "description": "...", "router_temperature": 1.0,
     "model": {"name": "...", "fingerprint": "...", "implied": [[], [31], ...]},
     "calibration": {"method": "layerwise", "documents": 20, "tokens": 5120, "seed": 0,
                     "experts": 16}}

`layers` has one entry a layer, null for a dense one. `scores`, where present, ranks ALL experts of
the layer, so that one file can be cut to any size. Shared and always-active experts are implied:
they belong to every pool, listed or not; `model.implied` names them, a list a layer, so that the
file can be cut where the model is not. `calibration.experts` is the size the pool was found at.
Whatever follows `layers` above may be left out, and so may each key of `model` and, but for
`method`, of `calibration`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from emo_serve.errors import ConfigError, PoolFileError, RequestError
from emo_serve.names import BASE_POOL, check_pool_name, join_names, split_name
from emo_serve.pools.strict_json import (
    optional_text,
    read_json,
    refusal,
    required_object,
    required_real,
)

if TYPE_CHECKING:  # emo.config imports transformers; reading a pool must not
    from emo_serve.emo.config import MoeLayer

__all__ = [
    "FORMAT",
    "ExpertPool",
    "LayerExperts",
    "PoolCalibration",
    "PoolModel",
    "check_layer",
    "check_temperature",
    "keep_best",
]

FORMAT = "emo-pool/1"
_CALIBRATION_COUNTS = ("documents", "tokens", "seed", "experts")


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one MoE layer, ascending; `scores` has one number for EACH of the layer's."""

    experts: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(sorted(self.experts)))
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(map(float, self.scores)))


@dataclass(frozen=True)
class PoolModel:
    """The model a pool was made for; the fingerprint covers its config and gates.

    `implied` holds, a layer each, the ids that belong to every pool, ascending; () where dense.
    """

    name: str | None = None
    fingerprint: str | None = None
    implied: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class PoolCalibration:
    """How a pool was found, and from how much text.

    `experts` is how many a layer were kept when it was found. A cut pool keeps that number: the
    scores of `layerwise` were taken on a path restricted to so many.
    """

    method: str
    documents: int | None = None
    tokens: int | None = None
    seed: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class ExpertPool:
    """Name the experts, per layer, that a request may use; None stands for a dense layer.

    Raises PoolFileError for ids or scores that no model could have. In memory any name will do (a
    union is called "a+b"); only a name that `check_pool_name` takes can be written to a file.
    """

    name: str
    layers: tuple[LayerExperts | None, ...]
    router_temperature: float = 1.0
    description: str = ""
    model: PoolModel | None = None
    calibration: PoolCalibration | None = None

    def __post_init__(self) -> None:
        source = f"pool {self.name!r}"
        object.__setattr__(self, "layers", tuple(self.layers))
        for index, layer in enumerate(self.layers):
            if layer is not None:
                check_layer(source, index, layer.experts, layer.scores)
        _check_implied(source, self.model, self.layers)
        temperature = check_temperature(source, self.router_temperature)
        object.__setattr__(self, "router_temperature", temperature)

    # -- views --

    @cached_property
    def content_hash(self) -> str:
        """Return the sha256, in hex, of what decides the output: experts and temperature.

        Complete pools before comparing hashes: an implied expert counts where it is listed.
        """
        experts = [None if layer is None else layer.experts for layer in self.layers]
        content = json.dumps([FORMAT, experts, self.router_temperature], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def expert_ids(self) -> tuple[tuple[int, ...], ...]:
        """Return the expert ids of each layer, ascending; () for a dense layer."""
        return tuple(() if layer is None else layer.experts for layer in self.layers)

    # -- maths --

    @classmethod
    def base(cls, moe_layers: Sequence[MoeLayer | None], name: str = BASE_POOL) -> ExpertPool:
        """Build the base pool: all experts of every layer."""
        layers = (
            None if layer is None else LayerExperts(tuple(range(layer.num_experts)))
            for layer in moe_layers
        )
        return cls(name, tuple(layers))

    def complete(self, moe_layers: Sequence[MoeLayer | None]) -> ExpertPool:
        """Add the model's shared and always-active experts; the pool must fit the model."""
        layers: list[LayerExperts | None] = []
        for pair in _paired(self, moe_layers):
            if pair is None:
                layers.append(None)
                continue
            layer, model_layer = pair
            layers.append(replace(layer, experts=tuple({*layer.experts, *model_layer.implied})))
        return replace(self, layers=tuple(layers))

    def union(self, other: ExpertPool) -> ExpertPool:
        """Unite two pools of one model, in either order with the same result; it has no scores.

        Raises RequestError when the two are routed at different temperatures: a request has one.
        """
        both = f"pools {self.name!r} and {other.name!r} cannot be united"
        if self.router_temperature != other.router_temperature:
            raise RequestError(
                f"{both}: a request routes at one router_temperature, they have"
                f" {self.router_temperature} and {other.router_temperature}"
            )
        if [layer is None for layer in self.layers] != [layer is None for layer in other.layers]:
            raise RequestError(f"{both}: they were made for models of different layers")
        layers = tuple(
            LayerExperts(tuple({*mine.experts, *theirs.experts})) if mine and theirs else None
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )
        return ExpertPool(
            name=join_names([*split_name(self.name), *split_name(other.name)]),
            layers=layers,
            router_temperature=self.router_temperature,
            model=self.model if self.model == other.model else None,
        )

    def cut(self, k: int, moe_layers: Sequence[MoeLayer | None] | None = None) -> ExpertPool:
        """Keep the `k` best-scored experts of each layer, implied ones included, never dropped.

        All experts of the layer compete, not only the pool's: with its scores a pool can grow as
        well as shrink. Ties go to the lower id; a layer of fewer than `k` experts keeps all.
        Without `moe_layers` the implied experts are those that `model.implied` names. Raises
        ConfigError for a `k` too small, PoolFileError for what is needed and not there.
        """
        layers: list[LayerExperts | None] = []
        for index, (layer, implied) in enumerate(
            zip(self.layers, self._implied(moe_layers), strict=True)
        ):
            if layer is None:
                layers.append(None)
                continue
            if k < max(1, len(implied)):
                raise ConfigError(
                    f"cannot cut pool {self.name!r} to {k} experts: layer {index} needs at least"
                    f" {max(1, len(implied))} (shared and always-active experts are never dropped)"
                )
            if layer.scores is None:
                expected = f"a number for each of its experts, by which to cut to {k} experts"
                raise refusal(f"pool {self.name!r}", "scores", None, expected, index)
            layers.append(replace(layer, experts=keep_best(layer.scores, k, implied)))
        return replace(self, layers=tuple(layers))

    def _implied(self, moe_layers: Sequence[MoeLayer | None] | None) -> Sequence[Collection[int]]:
        """Return the ids that belong to every pool, a layer each."""
        if moe_layers is not None:
            self.check_fits(moe_layers, None, f"pool {self.name!r}")
            return [() if layer is None else layer.implied for layer in moe_layers]
        implied = self.model.implied if self.model else None
        if implied is None:
            expected = "the shared and always-active experts; without it, cut with the model"
            raise refusal(f"pool {self.name!r}", "model.implied", None, expected)
        return implied

    # -- fit --

    def check_fits(
        self, moe_layers: Sequence[MoeLayer | None], fingerprint: str | None, source: str
    ) -> None:
        """Raise PoolFileError, naming `source`, layer and value, unless the model can use it.

        `fingerprint` is the checkpoint's; None, or a pool without one, leaves it unchecked.
        """
        made_for = self.model.fingerprint if self.model else None
        if fingerprint is not None and made_for not in (None, fingerprint):
            raise refusal(source, "model.fingerprint", made_for, f"this model's, {fingerprint!r}")
        if len(self.layers) != len(moe_layers):
            expected = f"one a layer of the model, {len(moe_layers)}"
            raise refusal(source, "the number of layers", len(self.layers), expected)
        for index, (layer, model_layer) in enumerate(zip(self.layers, moe_layers, strict=True)):
            if model_layer is None:
                if layer is not None:
                    listed = list(layer.experts)
                    raise refusal(source, "experts", listed, "null: the layer is dense", index)
                continue
            if layer is None:
                expected = f"experts: the layer has {model_layer.num_experts} and is not dense"
                raise refusal(source, "the entry", None, expected, index)
            _check_layer_fits(source, index, layer, model_layer)
            implied = self.model.implied[index] if self.model and self.model.implied else None
            if implied is not None and set(implied) != model_layer.implied:
                expected = f"the model's, {sorted(model_layer.implied)}"
                raise refusal(source, "model.implied", list(implied), expected, index)

    # -- file --

    @classmethod
    def read(cls, path: Path) -> ExpertPool:
        """Read one pool file; PoolFileError names file, layer, value and what was expected."""
        return cls.parse(str(path), read_json(path))

    @classmethod
    def parse(cls, source: str, document: object) -> ExpertPool:
        """Build a pool from the JSON value of a file, with the same refusals, naming `source`."""
        return _parse(source, document)

    def write(self, path: Path) -> None:
        """Write the pool as one file; readers see the old file or the new one, never a part.

        Raises PoolFileError for a name no file may carry and for a place that cannot be written.
        """
        check_pool_name(str(path), self.name)
        # The catalog reads *.json; this name is not one, and two writers do not meet in it.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            try:
                with partial.open("w", encoding="utf-8") as file:
                    file.write(_format(self))
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise PoolFileError(f"{path}: cannot be written: {error.strerror or error}") from error


def keep_best(scores: Sequence[float], k: int, implied: Collection[int]) -> tuple[int, ...]:
    """Return the `k` best-scored ids of a layer, ascending, implied ones always among them.

    Ties go to the lower id; a layer of fewer than `k` experts keeps all.
    """
    chosen = [expert for expert in range(len(scores)) if expert not in implied]
    best = sorted(chosen, key=lambda e: (-scores[e], e))[: max(0, k - len(implied))]
    return tuple(sorted({*implied, *best}))


# -- checks --


def check_temperature(source: str, value: object) -> float:
    """Return the number that divides the gate's logits, or raise PoolFileError."""
    expected = "a finite number above 0"
    temperature = required_real(source, "router_temperature", value, expected)
    if temperature <= 0:
        raise refusal(source, "router_temperature", value, expected)
    return temperature


def check_layer(
    source: str, index: int, experts: Sequence[object], scores: Sequence[object] | None
) -> None:
    """Refuse expert ids and scores that fit no model at all; raises PoolFileError."""
    seen: set[int] = set()
    for place, expert in enumerate(experts):
        if type(expert) is not int or expert < 0:  # a bool is an int to isinstance
            raise refusal(source, f"experts[{place}]", expert, "an id of 0 or more", index)
        if expert in seen:
            raise refusal(source, f"experts[{place}]", expert, "each id once", index)
        seen.add(expert)
    if scores is None:
        return
    for place, score in enumerate(scores):
        required_real(source, f"scores[{place}]", score, "a finite number", index)
    if seen and len(scores) <= max(seen):
        expected = f"one for each expert of the layer, at least {max(seen) + 1}"
        raise refusal(source, "the number of scores", len(scores), expected, index)


def _check_implied(
    source: str, model: PoolModel | None, layers: Sequence[LayerExperts | None]
) -> None:
    """Refuse a record of implied experts that contradicts the layers."""
    if model is None or model.implied is None:
        return
    if len(model.implied) != len(layers):
        expected = f"one list a layer, {len(layers)}"
        raise refusal(source, "the number of lists in model.implied", len(model.implied), expected)
    for index, (layer, implied) in enumerate(zip(layers, model.implied, strict=True)):
        scores = None if layer is None else layer.scores
        limit = 0 if layer is None else None if scores is None else len(scores)
        if implied and limit is not None and max(implied) >= limit:
            expected = f"ids below {limit}" if limit else "[]: the layer is dense"
            raise refusal(source, "model.implied", list(implied), expected, index)


def _check_layer_fits(source: str, index: int, layer: LayerExperts, model_layer: MoeLayer) -> None:
    num_experts = model_layer.num_experts
    for expert in layer.experts:
        if expert >= num_experts:
            raise refusal(source, "an expert", expert, f"an id from 0 to {num_experts - 1}", index)
    if layer.scores is not None and len(layer.scores) != num_experts:
        expected = f"one for each expert of the layer, {num_experts}"
        raise refusal(source, "the number of scores", len(layer.scores), expected, index)
    if not layer.experts and not model_layer.implied:
        raise refusal(source, "experts", [], "at least one: the layer has no shared ones", index)


def _paired(
    pool: ExpertPool, moe_layers: Sequence[MoeLayer | None]
) -> Iterator[tuple[LayerExperts, MoeLayer] | None]:
    """Yield each layer beside the model's, None where dense; refuse a pool that does not fit."""
    pool.check_fits(moe_layers, None, f"pool {pool.name!r}")
    for layer, model_layer in zip(pool.layers, moe_layers, strict=True):
        yield None if layer is None or model_layer is None else (layer, model_layer)


# -- file format --


def _parse(source: str, document: object) -> ExpertPool:
    if isinstance(document, dict) and document.get("format", FORMAT) != FORMAT:
        raise refusal(source, "format", document["format"], repr(FORMAT))
    fields = required_object(
        source,
        "the file",
        document,
        required=("format", "name", "layers"),
        optional=("description", "router_temperature", "model", "calibration"),
    )
    layers = fields["layers"]
    if not isinstance(layers, list) or not layers:
        raise refusal(source, "layers", layers, "a list with one entry a layer")
    description = fields.get("description", "")
    if not isinstance(description, str):
        raise refusal(source, "description", description, "a string")
    return ExpertPool(
        name=check_pool_name(source, fields["name"]),
        layers=tuple(_parse_layer(source, index, entry) for index, entry in enumerate(layers)),
        router_temperature=check_temperature(source, fields.get("router_temperature", 1.0)),
        description=description,
        model=_parse_model(source, fields.get("model")),
        calibration=_parse_calibration(source, fields.get("calibration")),
    )


def _parse_layer(source: str, index: int, entry: object) -> LayerExperts | None:
    if entry is None:
        return None
    fields = required_object(
        source, "the entry", entry, required=("experts",), optional=("scores",), layer=index
    )
    experts, scores = fields["experts"], fields.get("scores")
    if not isinstance(experts, list):
        raise refusal(source, "experts", experts, "a list of ids", index)
    if scores is not None and not isinstance(scores, list):
        raise refusal(source, "scores", scores, "a list of numbers", index)
    check_layer(source, index, experts, scores)
    return LayerExperts(tuple(experts), None if scores is None else tuple(scores))


def _parse_model(source: str, value: object) -> PoolModel | None:
    if value is None:
        return None
    fields = required_object(source, "model", value, optional=("name", "fingerprint", "implied"))
    return PoolModel(
        implied=_parse_implied(source, fields.get("implied")),
        name=optional_text(source, "model.name", fields.get("name")),
        fingerprint=optional_text(source, "model.fingerprint", fields.get("fingerprint")),
    )


def _parse_implied(source: str, value: object) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise refusal(source, "model.implied", value, "a list with one list of ids a layer")
    for index, ids in enumerate(value):
        for expert in ids:
            if type(expert) is not int or expert < 0 or ids.count(expert) > 1:
                expected = "ids of 0 or more, each once"
                raise refusal(source, "model.implied", ids, expected, index)
    return tuple(tuple(sorted(ids)) for ids in value)


def _parse_calibration(source: str, value: object) -> PoolCalibration | None:
    if value is None:
        return None
    fields = required_object(
        source, "calibration", value, required=("method",), optional=_CALIBRATION_COUNTS
    )
    if not isinstance(fields["method"], str):
        raise refusal(source, "calibration.method", fields["method"], "a string")
    for key in _CALIBRATION_COUNTS:
        count = fields.get(key)
        if count is not None and (type(count) is not int or count < 0):
            raise refusal(source, f"calibration.{key}", count, "a count of 0 or more")
    return PoolCalibration(**fields)  # type: ignore[arg-type]  # checked above


def _format(pool: ExpertPool) -> str:
    """Return the file's text: a field a line, a layer a line, optional fields only when set."""
    fields: dict[str, object] = {"format": FORMAT, "name": pool.name}
    if pool.description:
        fields["description"] = pool.description
    if pool.router_temperature != 1.0:
        fields["router_temperature"] = pool.router_temperature
    for key, record in (("model", pool.model), ("calibration", pool.calibration)):
        if record is not None:
            fields[key] = {k: v for k, v in vars(record).items() if v is not None}
    head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in fields.items())
    layers = ",\n".join(f"  {json.dumps(_layer_fields(layer))}" for layer in pool.layers)
    return f'{{\n{head} "layers": [\n{layers}\n ]\n}}\n'


def _layer_fields(layer: LayerExperts | None) -> dict[str, object] | None:
    if layer is None:
        return None
    fields: dict[str, object] = {"experts": layer.experts}
    return fields if layer.scores is None else fields | {"scores": layer.scores}
