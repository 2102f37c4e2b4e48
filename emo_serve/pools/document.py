"""The JSON of pools: the document that is a pool, and the request to build one from examples.

Both are read from files and from the body of POST /v1/pools by the models below, which also
describe them in /openapi.json. In memory a pool is an `ExpertPool`.

The document, "emo-pool/1", is one JSON object:

    {"format": "emo-pool/1", "name": "math",
     "layers": [null, {"experts": [3, 17], "scores": [0.01, ...]}, ...],
     "description": "...", "router_temperature": 1.0, "default_experts": 8,
     "model": {"name": "...", "fingerprint": "...", "implied": [[], [31], ...]},
     "calibration": {"method": "layerwise", "documents": 20, "tokens": 5120, "seed": 0,
                     "experts": 16}}

`layers` has one entry per layer, null for a dense one. `scores`, where present, ranks ALL experts
of the layer, so that one file can be cut to any size. `default_experts` is the size at which the
pool is served under its bare name: so many of the best per layer, in place of `experts`. Shared and
always-active experts are implied: they belong to every pool, listed or not. `model.implied` lists
them per layer, so that the file can be cut where the model is not. `calibration.experts` is the
size the pool was found at. All keys after `layers` are optional, as are those of `model`, and of
`calibration` all but `method`.

The request to build a pool:

    {"name": "math", "examples": ["a text", {"text": "..."}, {"messages": [...]}], "experts": 16}
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from emo_serve.errors import PoolFileError, RequestError
from emo_serve.names import FILE_NAME_RULE, NAME_PATTERN, check_pool_name
from emo_serve.pools.calibration import DEFAULT_METHOD
from emo_serve.pools.calibration.examples import Example, WrittenExample, example_of
from emo_serve.pools.limits import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    MOST_COUNT,
    MOST_EXPERTS,
    MOST_LAYERS,
    TEMPERATURE_RULE,
    check_text,
)
from emo_serve.pools.pool import (
    FORMAT,
    ExpertPool,
    LayerExperts,
    PoolCalibration,
    PoolModel,
    check_default,
    check_implied,
    check_layer,
    check_texts,
)
from emo_serve.pools.strict_json import place_of, read_json, refusal
from emo_serve.pools.strict_model import Expected, StrictModel, validated

__all__ = [
    "BuildRequest",
    "DocumentCalibration",
    "DocumentLayer",
    "DocumentModel",
    "PoolDocument",
    "format_pool",
    "is_build",
    "parse_build",
    "parse_pool",
    "read_pool",
    "write_pool",
]


def _each_once(ids: list[int]) -> list[int]:
    if len(set(ids)) < len(ids):
        raise ValueError("an id is given twice")
    return ids


_Name = Annotated[str, Field(pattern=NAME_PATTERN), Expected(FILE_NAME_RULE)]
_Id = Annotated[int, Field(ge=0)]
_Temperature = Annotated[
    float,
    Field(gt=0, ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE, allow_inf_nan=False),
    Expected(TEMPERATURE_RULE),
]
_Score = Annotated[float, Field(allow_inf_nan=False), Expected("a finite number")]
_Count = Annotated[int, Field(ge=0, le=MOST_COUNT), Expected("a count of 0 or more, below 2**63")]
_Size = Annotated[
    int,
    Field(ge=1, le=MOST_EXPERTS),
    Expected(f"a number of experts per layer, from 1 to {MOST_EXPERTS}"),
]
_ImpliedIds = Annotated[
    list[_Id],
    Field(fail_fast=True),
    AfterValidator(_each_once),
    Expected("ids of 0 or more, each once"),
]


# -- a pool --


class DocumentLayer(StrictModel):
    """The experts of one MoE layer."""

    experts: Annotated[
        list[Annotated[_Id, Expected("an id of 0 or more")]], Expected("a list of ids")
    ] = Field(description="expert ids; shared and always-active ones are implied")
    scores: Annotated[list[_Score], Expected("a list of numbers")] | None = Field(
        None, description="one number for each expert of the layer, by which the pool can be cut"
    )


class DocumentModel(StrictModel):
    """The model the pool was made for."""

    name: str | None = None
    fingerprint: str | None = Field(None, description="refused if it is not the served model's")
    implied: (
        Annotated[list[_ImpliedIds], Expected("a list with one list of ids per layer")] | None
    ) = Field(None, description="shared and always-active experts, one list per layer")


class DocumentCalibration(StrictModel):
    """How the pool was found."""

    method: str
    documents: _Count | None = None
    tokens: _Count | None = None
    seed: _Count | None = None
    experts: _Count | None = Field(None, description="kept per layer when the pool was found")


class PoolDocument(StrictModel):
    """A pool, as in a file of `--pools`; body of POST /v1/pools."""

    format: Literal["emo-pool/1"] = Field(description=f"always {FORMAT!r}")
    name: _Name
    layers: Annotated[
        list[DocumentLayer | None],
        Field(min_length=1),
        Expected("a list with one entry per layer"),
    ] = Field(description="one entry per layer of the model, null for a dense layer")
    description: str = ""
    router_temperature: _Temperature = Field(1.0, description="divides the gate's logits")
    default_experts: _Size | None = Field(
        None,
        description="experts per layer of the pool when it is named without a size: the best by"
        " `scores`, in place of `experts`",
    )
    model: DocumentModel | None = None
    calibration: DocumentCalibration | None = None


def read_pool(path: Path) -> ExpertPool:
    """Read one pool file; PoolFileError names file, layer, value and what was expected."""
    return parse_pool(place_of(path), read_json(path))


def parse_pool(source: str, value: object) -> ExpertPool:
    """Build a pool from the JSON value of a document, with the same refusals, naming `source`."""
    if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
        # A later format may have other keys, which are not to blame.
        raise refusal(source, "format", value["format"], repr(FORMAT))
    document = validated(PoolDocument, source, value, "the file")
    if len(document.layers) > MOST_LAYERS:
        raise refusal(
            source, "the number of layers", len(document.layers), f"at most {MOST_LAYERS}"
        )
    for index, layer in enumerate(document.layers):
        if layer is not None:  # checked in the order of the file, which the pool does not keep
            check_layer(source, index, layer.experts, layer.scores)
    made = document.calibration
    model = _model_of(document.model)
    calibration = made if made is None else PoolCalibration(**made.model_dump())
    check_texts(source, document.description, model, calibration)
    layers = tuple(map(_experts_of, document.layers))
    check_implied(source, model, layers)
    check_default(source, document.default_experts, layers)
    return ExpertPool(
        name=document.name,
        layers=layers,
        router_temperature=document.router_temperature,
        description=document.description,
        model=model,
        calibration=calibration,
        default_experts=document.default_experts,
    )


def _experts_of(layer: DocumentLayer | None) -> LayerExperts | None:
    if layer is None:
        return None
    return LayerExperts(tuple(layer.experts), None if layer.scores is None else tuple(layer.scores))


def _model_of(model: DocumentModel | None) -> PoolModel | None:
    if model is None:
        return None
    implied = None if model.implied is None else tuple(tuple(sorted(ids)) for ids in model.implied)
    return PoolModel(model.name, model.fingerprint, implied)


def write_pool(pool: ExpertPool, path: Path) -> None:
    """Write the pool as one file; readers see the old file or the new one, never a part.

    A link stays one: the file it leads to is replaced. Permissions stay those of the old file.
    Raises PoolFileError for a name no file may carry and for a place that cannot be written.
    """
    check_pool_name(str(path), pool.name)
    try:
        target = path.resolve() if path.is_symlink() else path
        # The catalog reads *.json; this name is not one, and two processes do not share it.
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(format_pool(pool))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise PoolFileError(f"{path}: cannot be written: {reason}") from error


def format_pool(pool: ExpertPool) -> str:
    """Return a pool as its file's text: a line per field and layer, optional fields when set."""
    fields: dict[str, object] = {"format": FORMAT, "name": pool.name}
    if pool.description:
        fields["description"] = pool.description
    if pool.router_temperature != 1.0:
        fields["router_temperature"] = pool.router_temperature
    if pool.default_experts is not None:
        fields["default_experts"] = pool.default_experts
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


# -- a build --


class BuildRequest(StrictModel):
    """A pool to build from examples; body of POST /v1/pools, in place of a pool."""

    name: _Name
    examples: Annotated[
        list[WrittenExample],
        Field(min_length=1),
        Expected("a list of texts or chats, at least one"),
    ] = Field(description="documents of the domain, or chats")
    # What is too small depends on the model, whose check says so.
    experts: Annotated[int, Expected("how many experts per layer to keep")] = Field(
        description="experts per layer to keep, shared ones included",
        json_schema_extra={"minimum": 1},
    )
    method: Annotated[
        Literal["layerwise", "router"],
        Expected(
            "'layerwise' or 'router'; a server builds by no other, emo-serve pools build does"
        ),
    ] = Field(
        DEFAULT_METHOD,
        description="layerwise: layer by layer, in what was kept below; router: in one pass of the"
        " full model, which must fit or be streamed",
    )
    description: str = ""
    router_temperature: _Temperature = Field(
        1.0, description="of the pool; it is found at temperature 1, as a file's is"
    )

    @property
    def documents(self) -> tuple[Example, ...]:
        """Return the examples, each with its place in the body."""
        return tuple(
            example_of(f"body.examples[{place}]", written)
            for place, written in enumerate(self.examples)
        )


def is_build(value: object) -> bool:
    """Tell whether a body asks for a pool to be built, rather than being one."""
    keys = set(value) if isinstance(value, dict) else set()
    return bool(keys & {"examples", "experts", "method"}) and not keys & {"format", "layers"}


def parse_build(value: object) -> BuildRequest:
    """Read a body; RequestError names field and value, and the example by its place."""
    request = validated(BuildRequest, "body", value, "the build", RequestError)
    try:
        check_text("body", "description", request.description)
    except PoolFileError as error:
        raise RequestError(str(error)) from error
    return request
