"""What a pool is: per MoE layer a set of experts, the temperature they are routed at, and a name.

A pool is a value: frozen, compared by content, and every operation returns a new one. Every pool,
read from a file or built in memory, is checked against itself. Whether it fits a model is a
separate question (`check_fits`), since a pool file can be read where the model is not. The JSON of
a pool is in `pools.document`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from emo_serve.errors import ConfigError, RequestError
from emo_serve.facts import MoeLayer
from emo_serve.names import BASE_POOL, join_names, sized_name, split_name
from emo_serve.pools.limits import MOST_EXPERTS, MOST_LAYERS, check_temperature, check_text
from emo_serve.pools.strict_json import refusal, required_real

__all__ = [
    "FORMAT",
    "ExpertPool",
    "LayerExperts",
    "PoolCalibration",
    "PoolModel",
    "check_default",
    "check_implied",
    "check_layer",
    "check_texts",
    "keep_best",
]

FORMAT = "emo-pool/1"


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

    `implied` holds, per layer, the ids that belong to every pool, ascending; () where dense.
    """

    name: str | None = None
    fingerprint: str | None = None
    implied: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class PoolCalibration:
    """How a pool was found, and from how much text.

    `experts` is how many per layer were kept when it was found. A cut pool keeps that number: the
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

    `default_experts` is the size that the bare name stands for: so many of the best per layer,
    where None stands for the experts listed. Raises PoolFileError for ids, scores or a default that
    no model could have. In memory any name will do (a union is called "a+b", a size "a@8"); only a
    name that `check_pool_name` takes can be written to a file.
    """

    name: str
    layers: tuple[LayerExperts | None, ...]
    router_temperature: float = 1.0
    description: str = ""
    model: PoolModel | None = None
    calibration: PoolCalibration | None = None
    default_experts: int | None = None

    def __post_init__(self) -> None:
        source = f"pool {self.name!r}"
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) > MOST_LAYERS:
            expected = f"at most {MOST_LAYERS}"
            raise refusal(source, "the number of layers", len(self.layers), expected)
        for index, layer in enumerate(self.layers):
            if layer is not None:
                check_layer(source, index, layer.experts, layer.scores)
        check_implied(source, self.model, self.layers)
        temperature = check_temperature(source, self.router_temperature)
        object.__setattr__(self, "router_temperature", temperature)
        check_texts(source, self.description, self.model, self.calibration)
        check_default(source, self.default_experts, self.layers)

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

    @property
    def has_scores(self) -> bool:
        """Tell whether every MoE layer ranks its experts, so that the pool can be cut."""
        return _are_scored(self.layers)

    def name_at(self, k: int) -> str:
        """Return the name by which the pool is asked for with its `k` best experts per layer."""
        return sized_name(self.name, k)

    @property
    def experts_per_layer(self) -> float:
        """Return the number of experts, mean over the MoE layers; 0 without any."""
        counts = [len(layer.experts) for layer in self.layers if layer is not None]
        return sum(counts) / max(1, len(counts))

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

        All experts of the layer compete, not only the pool's, so a pool with scores can grow as
        well as shrink. Ties go to the lower id; a layer of fewer than `k` experts keeps all.
        Without `moe_layers` the implied experts are those that `model.implied` names. Raises
        ConfigError for a `k` too small, PoolFileError where scores or implied ids are missing.
        """
        layers: list[LayerExperts | None] = []
        for index, (layer, implied) in enumerate(
            zip(self.layers, self.implied(moe_layers), strict=True)
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
        return replace(self, layers=tuple(layers), default_experts=None)

    def implied(self, moe_layers: Sequence[MoeLayer | None] | None) -> Sequence[Collection[int]]:
        """Return, per layer, the ids that belong to every pool.

        Without `moe_layers` those are what `model.implied` names; PoolFileError if it names none.
        """
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
            expected = f"one per layer of the model, {len(moe_layers)}"
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


def keep_best(scores: Sequence[float], k: int, implied: Collection[int]) -> tuple[int, ...]:
    """Return the `k` best-scored ids of a layer, ascending, always including the implied ones.

    Ties go to the lower id; a layer of fewer than `k` experts keeps all.
    """
    chosen = [expert for expert in range(len(scores)) if expert not in implied]
    best = sorted(chosen, key=lambda e: (-scores[e], e))[: max(0, k - len(implied))]
    return tuple(sorted({*implied, *best}))


# -- checks --


def check_layer(
    source: str, index: int, experts: Sequence[object], scores: Sequence[object] | None
) -> None:
    """Raise PoolFileError for expert ids and scores that no model could have."""
    for field, found in (("experts", experts), ("scores", scores or ())):
        if len(found) > MOST_EXPERTS:
            expected = f"at most {MOST_EXPERTS}"
            raise refusal(source, f"the number of {field}", len(found), expected, index)
    seen: set[int] = set()
    for place, expert in enumerate(experts):
        if type(expert) is not int or expert < 0:  # a bool is an int to isinstance
            raise refusal(source, f"experts[{place}]", expert, "an id of 0 or more", index)
        if expert >= MOST_EXPERTS:
            expected = f"an id of at most {MOST_EXPERTS - 1}"
            raise refusal(source, f"experts[{place}]", expert, expected, index)
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


def check_texts(
    source: str, description: str, model: PoolModel | None, calibration: PoolCalibration | None
) -> None:
    """Raise PoolFileError for a text that a file, an answer or a terminal cannot hold."""
    check_text(source, "description", description)
    if model is not None:
        check_text(source, "model.name", model.name)
        check_text(source, "model.fingerprint", model.fingerprint)
    if calibration is not None:
        check_text(source, "calibration.method", calibration.method)


def check_default(
    source: str, default_experts: object, layers: Sequence[LayerExperts | None]
) -> None:
    """Raise PoolFileError for a default size that no model allows, or without scores to cut by."""
    if default_experts is None:
        return
    if type(default_experts) is not int or not 1 <= default_experts <= MOST_EXPERTS:
        expected = f"a number of experts per layer, from 1 to {MOST_EXPERTS}"
        raise refusal(source, "default_experts", default_experts, expected)
    if not _are_scored(layers):
        expected = "no such key: a layer has no scores, by which its best experts are chosen"
        raise refusal(source, "default_experts", default_experts, expected)


def check_implied(
    source: str, model: PoolModel | None, layers: Sequence[LayerExperts | None]
) -> None:
    """Raise PoolFileError if the record of implied experts contradicts the layers."""
    if model is None or model.implied is None:
        return
    if len(model.implied) != len(layers):
        expected = f"one list per layer, {len(layers)}"
        raise refusal(source, "the number of lists in model.implied", len(model.implied), expected)
    for index, (layer, implied) in enumerate(zip(layers, model.implied, strict=True)):
        scores = None if layer is None else layer.scores
        limit = 0 if layer is None else MOST_EXPERTS if scores is None else len(scores)
        if implied and max(implied) >= limit:
            expected = f"ids below {limit}" if limit else "[]: the layer is dense"
            raise refusal(source, "model.implied", list(implied), expected, index)


def _are_scored(layers: Sequence[LayerExperts | None]) -> bool:
    return all(layer is None or layer.scores is not None for layer in layers)


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
