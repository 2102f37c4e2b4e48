"""An OpenAPI document as Markdown: routes with their parameters, bodies and answers, then objects.

Knows the part of JSON Schema that pydantic writes for our models, and fails on anything else rather
than leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

__all__ = ["render_openapi"]

Schema = dict[str, Any]

# FastAPI's own answer to bad parameters; vLLM's handlers turn it into a 400.
_FASTAPI_ONLY = {"HTTPValidationError", "ValidationError"}


def render_openapi(document: Schema) -> str:
    """Return all routes of `document`, then every object that they name."""
    schemas: dict[str, Schema] = dict(document.get("components", {}).get("schemas", {}))
    routes = [
        "\n\n".join(_route(method, path, operation, schemas))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    objects = [
        "\n\n".join(_object(name, schemas)) for name in sorted(schemas) if name not in _FASTAPI_ONLY
    ]
    return "\n\n".join(["## Routes", *routes, "## Objects", *objects])


def _route(method: str, path: str, operation: Schema, schemas: dict[str, Schema]) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield operation["description"]
    parameters = [one for one in operation.get("parameters", []) if one["in"] != "path"]
    if parameters:
        head = ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        yield "\n".join([*head, *map(_parameter, parameters)])
    body = operation.get("requestBody")
    if body:
        wanted = _type(_name_objects(_content(body), schemas))
        yield f"Body: {wanted}." if body.get("required") else f"Body: {wanted}, or none."
    yield "\n".join(
        ["| status | answer |", "|---|---|", *_answers(operation["responses"], schemas)]
    )


def _parameter(parameter: Schema) -> str:
    schema = parameter["schema"]
    meaning = _cell(parameter.get("description", ""), schema)
    return f"| `{parameter['name']}` | {parameter['in']} | {_type(schema)} | {meaning} |"


def _answers(responses: dict[str, Schema], schemas: dict[str, Schema]) -> Iterator[str]:
    for status, response in sorted(responses.items()):
        if status == "422":
            continue
        text = response["description"]
        if text == "Successful Response":
            text = HTTPStatus(int(status)).phrase
        content = _content(response)
        told = f": {_type(_name_objects(content, schemas))}" if content else ""
        yield f"| {status} | {text}{told} |"


def _content(message: Schema) -> Schema:
    schema: Schema = message.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _name_objects(schema: Schema, schemas: dict[str, Schema]) -> Schema:
    """Move objects that stand inside `schema` to `schemas`, and refer to them by their title."""
    if "properties" in schema or schema.get("type") == "object":
        fields = {
            name: _name_objects(field, schemas)
            for name, field in schema.get("properties", {}).items()
        }
        schemas[schema["title"]] = {**schema, "properties": fields}
        return {"$ref": f"#/components/schemas/{schema['title']}"}
    moved = dict(schema)
    if "anyOf" in schema:
        moved["anyOf"] = [_name_objects(choice, schemas) for choice in schema["anyOf"]]
    if "items" in schema:
        moved["items"] = _name_objects(schema["items"], schemas)
    return moved


# -- objects --


def _object(name: str, schemas: dict[str, Schema]) -> Iterator[str]:
    schema = schemas[name]
    yield f"### {name}"
    if "description" in schema:
        yield schema["description"]
    fields: Schema = schema.get("properties", {})
    base = _base_of(name, schemas)
    if base:
        yield f"All fields of [{base}](#{base.lower()}), and:"
        known = schemas[base]["properties"]
        fields = {key: value for key, value in fields.items() if known.get(key) != value}
    if fields:
        required = schema.get("required", [])
        rows = [_field(key, value, key in required) for key, value in fields.items()]
        yield "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _base_of(name: str, schemas: dict[str, Schema]) -> str | None:
    """Return the object that this one extends: one of many fields, all of which it has."""
    fields = set(schemas[name].get("properties", {}))
    found = [
        other
        for other, schema in schemas.items()
        if 5 <= len(schema.get("properties", {})) < len(fields) and fields > {*schema["properties"]}
    ]
    return found[0] if found else None


def _field(name: str, schema: Schema, is_required: bool) -> str:
    meaning = _cell(schema.get("description", ""), {} if is_required else schema)
    if not is_required and "default" not in meaning and "const" not in schema:
        meaning = f"{meaning} (optional)" if meaning else "optional"
    return f"| `{name}` | {_type(schema)} | {meaning} |".replace("|  |", "| |")


def _cell(text: str, schema: Schema) -> str:
    """Return a description with the default where there is one worth telling."""
    default = schema.get("default")
    if default in (None, "", schema.get("const")):
        return text
    told = f"default `{json.dumps(default)}`"
    return f"{text} ({told})" if text else told


def _type(schema: Schema) -> str:
    """Return a type in words; objects are links to their tables."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind: str = schema["type"]
    if kind == "array":
        items = _type(schema["items"])
        return f"list of ({items})" if "anyOf" in schema["items"] else f"list of {items}"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Schema) -> str:
    told = {"minimum": "at least", "exclusiveMinimum": "above", "minLength": "length at least"}
    bounds = [f"{words} {schema[key]}" for key, words in told.items() if key in schema]
    bounds += [f"`{schema['pattern']}`"] if "pattern" in schema else []
    return f" ({', '.join(bounds)})" if bounds else ""
