"""A pool built from examples by POST /v1/pools: what goes in, what comes out.

    {"name": "math", "examples": ["a text", {"text": "..."}, {"messages": [...]}], "experts": 16}

Examples are what a line of `emo-serve pools build`'s files may be, and are read by the same code.
As with pool documents, the pydantic models of what goes in only describe it, for /openapi.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from emo_serve.errors import ConfigError, PoolFileError, RequestError
from emo_serve.names import NAME_PATTERN, check_pool_name
from emo_serve.pools.calibration import DEFAULT_METHOD
from emo_serve.pools.calibration.examples import Example, parse_example
from emo_serve.pools.pool import check_temperature
from emo_serve.pools.strict_json import refusal, required_object
from emo_serve.server.pool_admin.schema import PoolCard, card_of

if TYPE_CHECKING:
    from emo_serve.server.pool_admin.builder import PoolBuild

__all__ = [
    "BuildCalibration",
    "BuildDocument",
    "BuildRequest",
    "BuiltPool",
    "ExampleChat",
    "ExampleMessage",
    "ExampleText",
    "built_of",
    "is_build",
    "parse_build",
]

_REQUIRED = ("name", "examples", "experts")
_OPTIONAL = ("method", "description", "router_temperature")
_SOURCE = "body"


@dataclass(frozen=True)
class BuildRequest:
    """The pool that somebody wants, and examples of what it is for."""

    name: str
    examples: tuple[Example, ...]
    experts: int
    description: str = ""
    router_temperature: float = 1.0


def is_build(document: object) -> bool:
    """Tell whether a body asks for a pool to be built, rather than being one."""
    keys = set(document) if isinstance(document, dict) else set()
    return bool(keys & {"examples", "experts", "method"}) and not keys & {"format", "layers"}


def parse_build(document: object) -> BuildRequest:
    """Read a body; RequestError names field and value, and the example by its place."""
    try:
        return _parse(document)
    except (ConfigError, PoolFileError) as error:
        raise RequestError(str(error)) from error


def _parse(document: object) -> BuildRequest:
    fields = required_object(_SOURCE, "the build", document, required=_REQUIRED, optional=_OPTIONAL)
    method = fields.get("method", DEFAULT_METHOD)
    if method != DEFAULT_METHOD:
        expected = f"{DEFAULT_METHOD!r}; a server builds by no other, emo-serve pools build does"
        raise refusal(_SOURCE, "method", method, expected)
    experts, examples = fields["experts"], fields["examples"]
    if type(experts) is not int:  # a bool is an int to isinstance
        raise refusal(_SOURCE, "experts", experts, "how many experts a layer to keep")
    if not isinstance(examples, list) or not examples:
        raise refusal(_SOURCE, "examples", examples, "a list of texts or chats, at least one")
    description = fields.get("description", "")
    if not isinstance(description, str):
        raise refusal(_SOURCE, "description", description, "a string")
    return BuildRequest(
        name=check_pool_name(_SOURCE, fields["name"]),
        examples=tuple(
            parse_example(f"{_SOURCE}.examples[{place}]", value)
            for place, value in enumerate(examples)
        ),
        experts=experts,
        description=description,
        router_temperature=check_temperature(_SOURCE, fields.get("router_temperature", 1.0)),
    )


# -- in --


class _Example(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class ExampleText(_Example):
    """One document; other keys are ignored."""

    text: str = Field(min_length=1)


class ExampleMessage(_Example):
    """One message of a chat, for the model's template."""

    role: str
    content: str


class ExampleChat(_Example):
    """One conversation; other keys are ignored."""

    messages: list[ExampleMessage] = Field(min_length=1)


class BuildDocument(BaseModel):
    """A pool to build from examples; body of POST /v1/pools, in place of a pool."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    examples: list[str | ExampleText | ExampleChat] = Field(
        min_length=1, description="documents of the domain, or chats"
    )
    experts: int = Field(ge=1, description="experts a layer to keep, shared ones included")
    method: Literal["layerwise"] = "layerwise"
    description: str = ""
    router_temperature: float = Field(
        1.0, gt=0, description="of the pool; it is found at temperature 1, as a file's is"
    )


# -- out --


class BuildCalibration(BaseModel):
    """How the pool was found, and how much of the text's routing it holds."""

    model_config = ConfigDict(frozen=True)

    method: str
    documents: int
    tokens: int = Field(description="of all documents, without those cut off")
    documents_cut: int = Field(description="documents that were longer than the context")
    tokens_cut: int = Field(description="tokens of these that were left out")
    experts: int = Field(description="kept a layer")
    seconds: float = Field(description="the build took")
    coverage: float | None = Field(
        description="share of the full router's mass inside the pool, mean over tokens and MoE"
        " layers; null where all experts are shared"
    )
    coverage_per_layer: list[float | None] = Field(description="null for a dense layer")


class BuiltPool(PoolCard):
    """A pool that was built here: its card, and what to know before relying on it."""

    calibration: BuildCalibration
    notes: list[str] = Field(description="a sentence each: too little text, mixed domains")


def built_of(build: PoolBuild) -> BuiltPool:
    """Build the answer about a pool that was built."""
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
